"""`seqloss serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx


class Server:
    """A `seqloss serve` process on a port of its own; its log is read as it comes."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "seqloss.cli", "serve", *arguments, "--port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Reads the log until it holds the pattern; fails where it ends before."""
        assert self.process.stderr is not None
        while not (match := re.search(pattern, self.log)):
            line = self.process.stderr.readline()
            assert line, f"the log ended without {pattern!r}:\n{self.log}"
            self.log += line
        return match

    def client(self) -> httpx.Client:
        """Speaks to the server once it is ready."""
        address = self.read_until(r"listening on (http://\S+)").group(1)
        self.read_until("is ready on")
        return httpx.Client(base_url=address)

    def exit_status(self) -> int:
        """Waits for the end; `log` is whole afterwards."""
        _, rest = self.process.communicate(timeout=60)
        self.log += rest
        return self.process.returncode
