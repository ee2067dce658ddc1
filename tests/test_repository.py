"""What the repository says of itself is true: generated modules, documents, references, imports."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from crc32c import crc32c

from ckptd.errors import CkptdError
from ckptd.format.blocks import SlotLayout
from ckptd.format.image import GroupRecord, ImageRecord
from ckptd.format.parity import ParityHeader
from ckptd.format.parity import encode_header as encode_parity_header
from ckptd.format.slot import MARK_OFFSET, STATE_OFFSET, SlotHeader, SlotState, encode_header
from ckptd.model import DTYPES, Geometry, Incarnation, Segment, SnapshotId

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OURS = ("ckptd", "client", "proto", "tests", "bench", "examples", "deploy", "docs", ".ci", "Makefile")
TEXT = {".py", ".pyi", ".proto", ".md", ".toml", ".yaml", ".yml", ".service", ".conf", ".json", ".sh", ""}
TEXT |= {".sysusers", ".tmpfiles"}


def files_of_the_repository() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT)
    for name in OURS:
        for folder, below, files in os.walk(ROOT / name):
            below[:] = [inner for inner in below if not inner.startswith((".", "__pycache__", "golden"))]
            yield from (Path(folder, file) for file in files if Path(file).suffix in TEXT)


def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def rows_of(document: str, heading: str) -> list[list[str]]:
    """The cells of the first table after ``heading``."""
    after = (ROOT / "docs" / document).read_text().split(heading, 1)[1].splitlines()
    start = next(number for number, line in enumerate(after) if line.startswith("| ---"))
    rows = []
    for line in after[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# --- generated ----------------------------------------------------------------------------------------------------
def test_the_modules_of_the_wire_are_those_of_the_protos(tmp_path: Path) -> None:
    plugins = [
        shutil.which(name, path=str(Path(sys.executable).parent))
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    if importlib.util.find_spec("grpc_tools") is None or not all(plugins):
        pytest.skip("grpcio-tools and mypy-protobuf are not installed")
    protos = sorted(path.relative_to(ROOT / "proto") for path in ROOT.glob("proto/ckptd_api/v1/*.proto"))
    outputs = [
        f"--{kind}_out={option}{tmp_path}"
        for kind, option in (("python", ""), ("grpc_python", ""), ("mypy", "quiet:"), ("mypy_grpc", "quiet:"))
    ]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs]
    command += [f"--plugin={plugin}" for plugin in plugins]
    subprocess.run([*command, *(f"proto/{path}" for path in protos)], cwd=ROOT, check=True)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*.py*")}
    assert fresh
    kept = {
        path.relative_to(ROOT / "proto"): path.read_text()
        for path in (ROOT / "proto").rglob("*_pb2*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert sorted(kept) == sorted(fresh)
    stale = [str(path) for path, text in fresh.items() if kept[path] != text]
    assert not stale, f"run `make proto`: {stale}"


# --- documents ----------------------------------------------------------------------------------------------------
def test_every_error_is_explained_to_operators() -> None:
    text = (ROOT / "docs/OPERATIONS.md").read_text().split("## What to do about each error", 1)[1]
    defined = [name for name, kind in CkptdError.registry.items() if kind.__module__ == "ckptd.errors"]
    assert [name for name in defined if f"`{name}`" not in text] == []
    explained = re.findall(r"`([A-Z]\w+)`", "".join(line.split("|")[1] for line in text.splitlines() if "|" in line))
    assert [name for name in explained if name not in defined] == []


def test_every_reference_of_reliability_is_a_test() -> None:
    text = (ROOT / "docs/RELIABILITY.md").read_text()
    references = re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
    assert references
    missing = [
        f"{path}::{name}"
        for path, name in references
        if not (ROOT / path).is_file() or name not in names_of_tests(ROOT / path)
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_the_slot_header_lies_where_the_document_says() -> None:
    rows = rows_of("FORMAT.md", "### Header page")
    layout = SlotLayout.plan(300, [Segment("float32", 400), Segment("bool", 5)], 1 << 16)
    header = SlotHeader(
        run="gpt",
        rank=3,
        world_size=4,
        uid=1000,
        snapshot=SnapshotId(Incarnation(7, 0xC0FFEE), 1200),
        parent=SnapshotId(Incarnation(6, 0xBEEF), 1100),
        roster_version=2,
        index_crc=0x12345678,
        is_persisted=True,
        sealed_at_s=1.5,
        layout=layout,
        generation=9,
    )
    encoded = encode_header(header, 0xABCD)
    found = [struct.unpack_from(f"<{kind}", encoded, int(offset))[0] for offset, kind, _ in rows]
    run = b"gpt".ljust(128, b"\0")
    expected = [b"CKPTSLOT", 1, 2, run, 3, 4, 1000, 7, 0xC0FFEE, 1200, 6, 0xBEEF, 1100, 300, 0x12345678, 1 << 16, 2]
    assert found == [*expected, layout.payload_bytes, 3, 1.5, 9]
    words = rows_of("FORMAT.md", "a cache line each")
    assert [int(row[0]) for row in words] == [STATE_OFFSET, MARK_OFFSET]
    states = rows_of("FORMAT.md", "| 3136 ")
    assert {row[0]: int(row[1], 16) for row in states} == {state.name: int(state) for state in SlotState}


def test_the_parity_header_lies_where_the_document_says() -> None:
    rows = rows_of("FORMAT.md", "## Parity file")
    images = (ImageRecord(()),) * 5
    group = GroupRecord("gpt", SnapshotId(Incarnation(7, 0xC0FFEE), 1200), Geometry(3, 2), 1 << 16, images)
    header = ParityHeader(group, stripe=4, row=1, piece_blocks=9)
    encoded = encode_parity_header(header, 0xABCD)
    found = [struct.unpack_from(f"<{kind}", encoded, int(offset))[0] for offset, kind, _ in rows]
    fields = [b"CKPTPRTY", 1, b"gpt".ljust(128, b"\0"), 7, 0xC0FFEE, 1200, 4, 1, 1 << 16, 9]
    crc = crc32c(encoded[:196] + (0xABCD).to_bytes(4, "little"))
    assert found == [*fields, len(header.record), crc32c(header.record), crc, 0xABCD]


def test_the_dtype_codes_are_those_of_the_document() -> None:
    halves = [row[at : at + 3] for row in rows_of("FORMAT.md", "### Dtype codes") for at in (0, 3)]
    documented = {int(code): (name, stored) for code, name, stored in halves}
    assert documented == {code: (dtype.name, dtype.stored) for code, dtype in enumerate(DTYPES)}


# --- the tree -----------------------------------------------------------------------------------------------------
# Put together from parts, so that this file does not name what it forbids.
FORBIDDEN = {
    "a registry": r"py" + r"pi\.org|python" + r"hosted\.org|download\.py" + r"torch\.org|--(?:extra-)?index" + r"-url",
    "a path of one machine": r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|opt/py" + r"pi)/\w",
    "an issue's number": r"\bissue" + r"s? #?\d+|[\w-]+/[\w.-]+#\d+|\b[a-z]+#" + r"\d+",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = []
    for path in files_of_the_repository():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_the_daemon_runs_without_torch() -> None:
    code = "import ckptd.serve.server, sys; assert 'torch' not in sys.modules and 'ckptd_client' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "bench").glob("*.py")))
def test_a_measurement_finds_what_it_measures(name: str) -> None:
    importlib.import_module(f"bench.{name}")
