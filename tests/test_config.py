"""Settings: where they come from, what is refused and how, and the file that documents them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd import config
from ckptd.config import Settings, format_size, load_settings, parse_host_port, parse_size
from ckptd.errors import EXIT_USAGE, InvalidRequest

DOC = Path(__file__).parents[1] / "docs" / "CONFIG.md"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(config.variable_of(name), raising=False)


# --- sizes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("16GB", 16 * 10**9),
        ("4096", 4096),
        ("1 kib", 1024),
        ("0", 0),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8G", "8 GiB GiB", "1e9", "8,5GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (8 << 30, "8GiB"), (5 << 50, "5120TiB")]
)
def test_sizes_are_shown_in_binary_units(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 1 << 60))
@settings(max_examples=200)
def test_a_shown_size_can_be_read_again_within_its_rounding(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("text", "pair"), [("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:70", ("::1", 70)), ("node3:0", ("node3", 0))]
)
def test_host_and_port_are_read(text: str, pair: tuple[str, int]) -> None:
    assert parse_host_port(text) == pair


# --- precedence ---------------------------------------------------------------------------------------------------
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ckptd.toml"
    file.write_text('slots = 4\nmemory = "1GiB"\ndrain_deadline = 5\ntiers = ["file:///a,every=3"]\n')
    flags = {"config": file, "arena": tmp_path}
    assert load_settings(flags).slots == 4
    assert load_settings(flags).drain_deadline_s == 5
    assert load_settings(flags).stage_deadline_s == 60
    assert load_settings(flags).tiers == ("file:///a,every=3",)
    monkeypatch.setenv("CKPTD_SLOTS", "5")
    monkeypatch.setenv("CKPTD_TIERS", "file:///b file:///c,keep=2")
    assert load_settings(flags).slots == 5
    assert load_settings(flags).tiers == ("file:///b", "file:///c,keep=2")
    assert load_settings(flags | {"slots": 6}).slots == 6
    assert load_settings(flags | {"memory_bytes": "2GiB"}).memory_bytes == 2 << 30
    assert load_settings(flags).memory_bytes == 1 << 30


def test_the_environment_can_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ckptd.toml"
    file.write_text("slots = 7\ninsecure = true\n")
    monkeypatch.setenv("CKPTD_CONFIG", str(file))
    assert load_settings({}).slots == 7
    assert load_settings({}).insecure is True


def test_an_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_SLOTS", "")
    assert load_settings({}).slots == 3


def test_the_daemon_variable_names_the_socket_as_it_does_for_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_DAEMON", "unix:///run/x/d.sock")
    assert load_settings({}).socket == Path("/run/x/d.sock")


# --- defaults -----------------------------------------------------------------------------------------------------
def test_the_arena_follows_from_the_socket() -> None:
    digest = hashlib.sha256(b"/tmp/a/ckptd.sock").hexdigest()[:12]
    assert load_settings({"socket": "/tmp/a/ckptd.sock"}).arena == Path(f"/dev/shm/ckptd-{digest}")


def test_a_user_who_cannot_write_run_gets_a_socket_of_their_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert config.default_socket() == Path("/run/user/7/ckptd/ckptd.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(config.os, "getuid", lambda: 7)
    assert config.default_socket() == Path("/tmp/ckptd-7/ckptd.sock")


def test_a_caller_finds_the_socket_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "a.sock", tmp_path / "b.sock"
    there.touch()
    monkeypatch.setattr(config, "socket_candidates", lambda: (here, there))
    assert config.find_socket() == there


def test_the_fd_socket_lies_beside() -> None:
    assert config.fd_socket_path(Path("/a/ckptd.sock")) == Path("/a/ckptd.fd.sock")
    assert config.fd_socket_path(Path("/a/d.1")) == Path("/a/d.1.fd.sock")


def test_default_memory_is_at_most_half_of_what_is_free(tmp_path: Path) -> None:
    assert 0 <= config.default_memory(tmp_path / "not" / "there") <= 8 << 30


# --- refusals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"slots": 1}, r"^--slots: .*greater than or equal to 2, got 1"),
        ({"slots": "x"}, "^--slots: "),
        ({"memory_bytes": "8x"}, "^--memory: '8x' is not a size"),
        ({"memory_bytes": "0"}, "^--memory: "),
        ({"listen": "7070"}, "^--listen: '7070' is not HOST:PORT"),
        ({"http": "h:99999"}, "^--http: "),
        ({"protect_max": "4"}, r"^--protect-max: '4' is not k\+m"),
        ({"protect_max": "200+100"}, "^--protect-max: "),
        ({"domains": ("rack",)}, "^--domain: 'rack' is not KEY=VALUE"),
        ({"allow_group": "no such group"}, "^--allow-group: "),
        ({"tls_cert": "/nope.pem"}, "^--tls-cert: /nope.pem cannot be read"),
        ({"log_level": "loud"}, "^--log-level: "),
        ({"config": "/nope.toml"}, "^--config: /nope.toml cannot be read"),
        ({"socket": "host:1"}, "^--socket: 'host:1' is not a path"),
        ({"socket": "/tmp/" + "x" * 100}, "^--socket: .* is longer than 107 bytes"),
        ({"drain_deadline_s": -1}, "^--drain-deadline: "),
    ],
)
def test_what_is_not_valid_is_one_line_that_names_the_flag(flags: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        load_settings(flags)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == EXIT_USAGE


def test_a_file_with_an_unknown_key_or_no_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ckptd.toml"
    file.write_text("slotz = 4\n")
    with pytest.raises(InvalidRequest, match="'slotz', which is no setting"):
        load_settings({"config": file})
    file.write_text("slots = \n")
    with pytest.raises(InvalidRequest, match="is not TOML"):
        load_settings({"config": file})


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, object]:
    flags: dict[str, object] = {}
    for name in ("tls_cert", "tls_key", "tls_ca"):
        flags[name] = tmp_path / f"{name}.pem"
        (tmp_path / f"{name}.pem").touch()
    return flags


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "10.0.0.1:1", "node3:1", "[2001:db8::1]:1"])
def test_an_address_others_reach_needs_tls(listen: str, tls: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="take anyone's word"):
        load_settings({"listen": listen})
    with pytest.raises(InvalidRequest, match="--insecure is for loopback addresses only"):
        load_settings({"listen": listen, "insecure": True})
    assert load_settings({"listen": listen, **tls}).listen == listen


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.8.8:1", "localhost:1", "[::1]:1"])
def test_a_loopback_address_needs_tls_or_insecure(listen: str, tls: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="take anyone's word") as caught:
        load_settings({"listen": listen})
    assert "--insecure" in caught.value.hint
    assert load_settings({"listen": listen, "insecure": True}).insecure
    assert load_settings({"listen": listen, **tls}).listen == listen


def test_tls_is_all_of_its_files_and_not_insecure(tls: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="needs all of its files"):
        load_settings({"tls_cert": tls["tls_cert"]})
    with pytest.raises(InvalidRequest, match="contradicts"):
        load_settings({**tls, "insecure": True})


# --- documentation ------------------------------------------------------------------------------------------------
def test_the_document_is_what_the_code_prints() -> None:
    assert DOC.read_text() == config.config_markdown(), "run: python -m ckptd.config > docs/CONFIG.md"


def test_names_follow_from_the_field() -> None:
    assert config.key_of("memory_bytes") == "memory"
    assert config.variable_of("stage_deadline_s") == "CKPTD_STAGE_DEADLINE"
    assert config.flag_of("tiers") == "--tier"
    assert config.flag_of("slots") == "--slots"
    assert len({config.variable_of(name) for name in Settings.model_fields}) == len(Settings.model_fields)
