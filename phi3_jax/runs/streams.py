"""The standard streams of a program, as whoever started it left them."""

import io
import os
import sys


def complete_standard_streams() -> None:
    """Opens the standard streams that are closed, and escapes on output what its encoding cannot express.

    A closed input is empty, and writing to a closed output fails. Python has None in their place, where
    notes for stderr would go to stdout, and the next file to be opened would become the stream.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            # Without a buffer, which would be written once more, and fail, at the end of the program.
            file = io.FileIO(descriptor, "r" if name == "stdin" else "w")
            setattr(sys, name, io.TextIOWrapper(file, encoding="utf-8", write_through=True))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # UTF-8 cannot express all names of files
