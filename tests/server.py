"""`seqloss serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx


class Server:
    """A `seqloss serve` process on a port of its own; its log is read as it comes."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self._start("-m", "seqloss.cli", "serve", *arguments, "--port", str(port))

    @classmethod
    def with_fault(cls, fault: str, **settings: object) -> Server:
        """A server of the fake model whose engine fails; see `faulty_service.py`."""
        server = cls.__new__(cls)
        environment = {f"SEQLOSS_{name.upper()}": str(value) for name, value in settings.items()}
        server._start(str(Path(__file__).parent / "faulty_service.py"), fault, **environment)
        return server

    def _start(self, *command: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
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
        address = self.read_until(r'listening on (http://[^\s"]+)').group(1)
        self.read_until("is ready on")
        return httpx.Client(base_url=address)

    @property
    def address(self) -> str:
        """Where it is, once it is ready."""
        self.read_until("is ready on")
        return self.read_until(r'listening on (http://[^\s"]+)').group(1)

    def exit_status(self) -> int:
        """Waits for the end; `log` is whole afterwards."""
        _, rest = self.process.communicate(timeout=60)
        self.log += rest
        return self.process.returncode
