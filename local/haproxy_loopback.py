"""Stands before HAProxy: closes what Ray Serve's config leaves open to the network, then becomes HAProxy.

Ray binds HAProxy's statistics and metrics to all interfaces, makes its admin socket writable for everyone on the host,
and has no setting for any of it. `RAY_SERVE_HAPROXY_BINARY_PATH` names the launcher that `write_launcher` makes; Ray
runs it as HAProxy, `-f CONFIG` among its arguments, at the start and at each reload. `exec` keeps the process id, by
which Ray knows its proxy, and the config keeps its path, by which Ray finds it again.

This file runs by itself, without the repository on its path: standard library only.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

LOOPBACK = "127.0.0.1"
# Sections whose ports are for this host only. The two others take requests, where the operator said.
_PRIVATE = ("frontend prometheus", "listen stats")
_PUBLIC = ("frontend http_frontend", "frontend grpc_frontend")
_SECTION = re.compile(r"^(?:global|defaults|frontend|backend|listen|peers|resolvers|userlist|program)\b")
_BIND = re.compile(r"^(\s+bind\s+)(\S*):(\d+)(.*)$")
_ADMIN_SOCKET = re.compile(r"^(\s+stats socket\s.*?\bmode\s+)(\d+)(\s.*)$")


class UnknownConfigError(ValueError):
    """The config is not what this Ray's template gives: what it opens is not known."""


def closed(config: str) -> str:
    """The same config with statistics and metrics on loopback, the admin socket for its owner, and no Server header.

    Raises:
        UnknownConfigError: one of the lines is not there, or another listens on an address that is not loopback.
    """
    section, lines, done = "", [], set()
    for line in config.splitlines():
        if _SECTION.match(line):
            section = " ".join(line.split())
        bind, admin_socket = _BIND.match(line), _ADMIN_SOCKET.match(line)
        if bind and section in _PRIVATE:
            line = f"{bind[1]}{LOOPBACK}:{bind[3]}{bind[4]}"
            done.add(section)
        elif admin_socket and section == "global":
            line = f"{admin_socket[1]}600{admin_socket[3]}"
            done.add("stats socket")
        elif re.match(r"^\s+bind\b", line) and section not in _PUBLIC and not (bind and bind[2] == LOOPBACK):
            raise UnknownConfigError(f"section {section!r} has {line.strip()!r}; expected no other port")
        lines.append(line)
        if bind and section == _PUBLIC[0]:
            done.add(section)
            # The web server of the replicas names itself.
            if "    http-response del-header Server" not in config:
                lines.append("    http-response del-header Server")
    missing = [part for part in (*_PRIVATE, _PUBLIC[0], "stats socket") if part not in done]
    if missing:
        raise UnknownConfigError(f"no line to close in {', '.join(missing)}; is this another version of Ray?")
    return "\n".join(lines) + "\n"


def close_file(path: Path) -> None:
    """Closes a config file in place, at once.

    Raises:
        UnknownConfigError: as `closed`; the file is as it was.
        OSError: it cannot be read or replaced.
    """
    text = closed(path.read_text(encoding="utf-8"))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def config_files(arguments: list[str]) -> list[Path]:
    """The files after `-f`; none for calls such as `haproxy -v`."""
    return [Path(value) for flag, value in zip(arguments, arguments[1:], strict=False) if flag == "-f"]


def write_launcher(path: Path, binary: str) -> None:
    """Writes the executable that stands for `binary`, a HAProxy."""
    command = shlex.join([sys.executable, "-I", str(Path(__file__).resolve()), binary])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o700)


def main(arguments: list[str]) -> None:
    """`HAPROXY ARGUMENT...`: does not return, unless by an error."""
    binary, *rest = arguments
    for file in config_files(rest):
        try:
            close_file(file)
        except (UnknownConfigError, OSError) as error:
            raise SystemExit(f"haproxy_loopback: error: {file}: {error}") from None
    os.execv(binary, [binary, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
