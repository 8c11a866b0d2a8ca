"""The command line in a pseudo-terminal."""

import fcntl
import logging
import os
import pty
import re
import signal
import struct
import sys
import termios
import time

import torch

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """Run a tool in a fork of this process with a pseudo-terminal."""

    def __init__(self, tool, arguments, before=None, columns=100):
        self.output = ""
        self.pid, self.handle = pty.fork()
        if self.pid:
            fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
            return
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            os.environ.update(TERM="xterm-256color")
            os.environ.pop("COLUMNS", None)
            sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
            logging.getLogger().handlers = []
            if before:
                before()
            status = tool.cli([*map(str, arguments)])
        finally:
            os._exit(status)

    def wait_for(self, pattern, seconds=100):
        """Read until the output matches `pattern`."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert time.monotonic() < deadline and self._read(), self.output

    def _read(self):
        try:
            self.output += os.read(self.handle, 65536).decode()
            return True
        except OSError:  # the terminal is closed
            return False

    def end(self):
        """Return the exit status and the output."""
        while self._read():
            pass
        os.close(self.handle)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.output


def shown(output):
    """Return the output as plain text, and its part after the last display."""
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    # an erased line starts a new line
    plain = ESCAPES.sub(lambda code: "\n" if code[0] == "\x1b[2K" else "", output).replace("\r", "")
    last = re.split(r"\nrun +/", plain)[-1]
    return plain, last
