"""Reads a stranger's `torch.export` archive without giving it a chance to run anything.

`torch.export.load` (2.13) trusts its file in more ways than its pickles:

  - weights, constants and sample inputs are unpickled where the archive says so;
  - symbolic sizes are strings given to `sympy.sympify`, which calls `eval`;
  - `guards_code` is Python source given to `exec` when the program becomes a module;
  - an operator may be one that opens files, such as `aten.from_file`;
  - names of inputs are pasted into the generated source of the module.

So the JSON of the program is held against `graph_policy` before Torch sees it, and what Torch sees
is a new archive, packed from the checked parts alone: two readers of one ZIP file may disagree
about what is in it.  `distil` makes archives that pass, `checked` lets only such pass.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import Any

from seqloss.bundle.graph_policy import program_faults
from seqloss.errors import BundleError

# Where in an archive, below its root folder, the graph stands as JSON.
PROGRAM = "models/model.json"
_WEIGHTS_CONFIG = "data/weights/model_weights_config.json"
_CONSTANTS_CONFIG = "data/constants/model_constants_config.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_MARKERS = ("archive_format", "archive_version", "byteorder", ".data/version")
_IGNORED = (".data/serialization_id",)
_WEIGHT = re.compile(r"data/weights/weight_\d+")


def distil(archive: bytes) -> bytes:
    """Drops what serving needs not: weights, sample inputs, guards, traces of the source code.

    Args:
        archive: what `torch.export.save` wrote.

    Raises:
        BundleError: the rest would be refused by `checked`.
    """
    members = _members(archive)
    program = json.loads(members[PROGRAM])
    program["guards_code"] = []
    del program["graph_module"]["module_call_graph"][1:]
    for node in program["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}
    members[PROGRAM] = json.dumps(program).encode()
    members = {
        name: b"" if name == _SAMPLE_INPUTS or _WEIGHT.fullmatch(name) else content
        for name, content in members.items()
    }
    return checked(_pack(members))


def checked(archive: bytes) -> bytes:
    """The same program in a new archive that holds nothing unchecked.

    Args:
        archive: a stranger's file.

    Raises:
        BundleError: it could run code, read files, or is not an archive of an exported program;
            lists every fault.
    """
    members = _members(archive)
    faults = [
        f"has the unexpected member {name!r}"
        for name, content in members.items()
        if not _is_expected(name, content)
    ]
    faults += [f"lacks {name!r}" for name in _REQUIRED if name not in members]
    parsed: dict[str, Any] = {}
    for name in (PROGRAM, _WEIGHTS_CONFIG, _CONSTANTS_CONFIG):
        try:
            parsed[name] = json.loads(members.get(name, b"{}"))
        except (ValueError, RecursionError):
            faults.append(f"{name} is not JSON")
    faults += program_faults(parsed.get(PROGRAM))
    faults += _payload_faults(parsed.get(_WEIGHTS_CONFIG), "weight")
    faults += _payload_faults(parsed.get(_CONSTANTS_CONFIG), "tensor")
    if faults:
        raise BundleError("the exported program cannot be trusted", faults)
    return _pack(members | {name: json.dumps(content).encode() for name, content in parsed.items()})


_REQUIRED = (PROGRAM, _WEIGHTS_CONFIG, _CONSTANTS_CONFIG, _SAMPLE_INPUTS, *_MARKERS)


def _is_expected(name: str, content: bytes) -> bool:
    if name == _SAMPLE_INPUTS or _WEIGHT.fullmatch(name):
        return not content
    return name in _REQUIRED


def _members(archive: bytes) -> dict[str, bytes]:
    """The archive's files by their path below its root folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            infos = file.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise BundleError("the exported program is compressed, which Torch never does")
            if sum(info.file_size for info in infos) > len(archive):
                raise BundleError("the exported program has members that overlap")
            contents = [(info.filename, file.read(info)) for info in infos]
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        raise BundleError(f"the exported program is not a ZIP archive: {error}") from error
    members = {name.partition("/")[2]: content for name, content in contents}
    roots = {name.partition("/")[0] for name, _ in contents}
    if len(members) != len(contents) or len(roots) > 1:
        raise BundleError("the exported program has members of the same name")
    return {name: content for name, content in members.items() if name not in _IGNORED}


def _pack(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name in sorted(members):
            # A fixed date: the same program has the same bytes, and so the same digest.
            file.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), members[name])
    return buffer.getvalue()


def _payload_faults(config: Any, prefix: str) -> list[str]:
    """Whether weights or constants are plain tensors, none of them pickled."""
    try:
        payloads = list(config["config"].values())
        return [
            f"stores the payload {payload['path_name']!r} as something else than a plain tensor"
            for payload in payloads
            if payload["use_pickle"] is not False
            or not re.fullmatch(rf"{prefix}_\d+", payload["path_name"])
            or payload["tensor_meta"] is None
        ]
    except (KeyError, TypeError, AttributeError):
        return [f"has a malformed list of {prefix} payloads"]
