"""What a server's own words mean: turns its last output into the error that says whose fault it is and what to do."""

from textwrap import indent

from headrace.errors import DirectoryUnusable, EmbeddedServerFailed, HeadraceError, PortTaken

FREE_SPACE = (
    "Free some space (a new Postgres shard takes about 50 MB), or choose another directory with `--directory`."
)
WRITABLE = "Make the directory writable for the user that runs headrace, or choose another one with `--directory`."

# The servers run with LC_ALL=C, so these are strerror's English words on Linux and macOS alike.
_MEANINGS: tuple[tuple[str, type[HeadraceError], str], ...] = (
    ("no space left on device", DirectoryUnusable, FREE_SPACE),
    ("disk quota exceeded", DirectoryUnusable, FREE_SPACE),
    ("disc quota exceeded", DirectoryUnusable, FREE_SPACE),
    ("file too large", DirectoryUnusable, "Raise the file-size limit (`ulimit -f unlimited`) of the process."),
    ("read-only file system", DirectoryUnusable, WRITABLE),
    ("permission denied", DirectoryUnusable, WRITABLE),
    ("address already in use", PortTaken, "Stop the other process, or choose another port."),
)


def failure(summary: str, output: str) -> HeadraceError:
    """The error for a server or one of its tools that ended with `output`, which the message quotes."""
    words = output.lower()
    said = f"{summary} It said:\n{indent(output, '  ')}\n" if output else f"{summary} It said nothing."
    for phrase, error, fix in _MEANINGS:
        if phrase in words:
            return error(said, fix=fix)
    return EmbeddedServerFailed(said)
