"""Installs gradsmith, editable, with everything that constraints.txt pins: install.py [EXTRAS].

Run by the environment's own Python. uv does it in a fraction of pip's time; where uv is not to be
had, or does not succeed, pip does it. uv reads no pip.conf, so it is told what pip knows of
indexes, folders of wheels and certificates.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = "constraints.txt"
PIP = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
# pip's setting, uv's variable, and what stands between several values of the latter
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
}


def settings_of_pip() -> dict[str, str]:
    """pip's settings as uv's variables; a user's own variables for uv win."""
    listed = subprocess.run(
        (sys.executable, "-m", "pip", "config", "list"), capture_output=True, text=True
    ).stdout
    found = {}
    lines = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    for section in ("global", "install", ":env:"):  # the later ones win
        for name, (variable, separator) in SETTINGS.items():
            value = lines.get(f"{section}.{name}")
            if value is not None:
                found[variable] = separator.join(str(ast.literal_eval(value)).split())
    if "UV_INDEX" in found:  # pip takes the best of all; uv asks only the first that answers
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in found.items() if name not in os.environ}


def by_uv(what: str) -> bool:
    """Whether uv was to be had and has installed it."""
    if subprocess.run((*PIP, "-c", CONSTRAINTS, "uv"), stderr=subprocess.DEVNULL).returncode:
        return False
    uv = str(Path(sys.executable).with_name("uv"))
    constraints = ("--constraints", CONSTRAINTS, "--build-constraints", CONSTRAINTS)
    # It would take an extension for built whose setup.py is no newer.
    again = ("--reinstall-package", "gradsmith")
    command = (uv, "pip", "install", "--python", sys.executable, *constraints, *again, "-e", what)
    return subprocess.run(command, env={**os.environ, **settings_of_pip()}).returncode == 0


def main() -> int:
    what = f".[{sys.argv[1]}]" if len(sys.argv) > 1 else "."
    if by_uv(what):
        return 0
    print("without uv: pip takes some minutes", flush=True)
    # The isolated environment that builds the extension takes the pinned versions too: pip reads
    # the second name from 25.3 on, the first before that.
    pinned = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), CONSTRAINTS)
    return subprocess.run((*PIP, "-e", what), env={**os.environ, **pinned}).returncode


if __name__ == "__main__":
    sys.exit(main())
