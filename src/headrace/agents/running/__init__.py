"""One execution after another: steps, deadlines, what is said meanwhile, what is remembered afterwards."""
