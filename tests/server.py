"""`seqloss serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

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
        # Read by a thread, and by nobody else: a server does not wait for who reads its log.
        stream, self.process.stderr = self.process.stderr, None
        assert stream is not None
        self.log = ""
        self._grown = threading.Condition()
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._grown:
                    self.log += line
                    self._grown.notify_all()
        with self._grown:
            self._has_ended = True
            self._grown.notify_all()

    def read_until(self, pattern: str) -> re.Match[str]:
        """Waits until the log holds the pattern; fails where it ends before."""
        with self._grown:
            while not (match := re.search(pattern, self.log)):
                assert not self._has_ended, f"the log ended without {pattern!r}:\n{self.log}"
                self._grown.wait()
            return match

    def client(self) -> httpx.Client:
        """Speaks to the server once it is ready."""
        address = self.read_until(r'listening on (http://[^\s"]+)').group(1)
        self.read_until("is ready on")
        return httpx.Client(base_url=address, timeout=300)

    @property
    def address(self) -> str:
        """Where it is, once it is ready."""
        self.read_until("is ready on")
        return self.read_until(r'listening on (http://[^\s"]+)').group(1)

    def exit_status(self) -> int:
        """Waits for the end; `log` is whole afterwards."""
        status = self.process.wait(timeout=300)
        self._reader.join()
        return status
