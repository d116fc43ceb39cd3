"""What leaves the monitor in other systems' formats."""
