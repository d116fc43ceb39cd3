"""`headrace up` says which doors are open, and where."""


def test_open_doors_are_announced(doors):
    """Beside the dashboard and the API; read from what the command prints."""
    assert doors.service.process.stdout is not None
    lines = []
    while not lines or "stop" not in lines[-1]:
        lines.append(doors.service.process.stdout.readline())
    said = dict(line.split(maxsplit=1) for line in lines)

    assert said["A2A"].strip() == f"{doors.url}/a2a"
    assert said["MCP"].strip() == f"{doors.url}/mcp"
    assert said["AG-UI"].strip() == f"{doors.url}/ag-ui"
