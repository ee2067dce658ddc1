"""Who is calling: session tokens bound to the uid of a Unix socket's peer, or to a client certificate over TCP."""

from __future__ import annotations

import grp
import os
import pwd
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ckptd.errors import NotPermitted, SessionExpired

_MOST: Final = 65536


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller: ``name`` is ``uid:1000`` or ``cert:NAME``; ``uid`` is what slot headers record; ``pid`` as the kernel
    tells it for this namespace, 0 unknown."""

    name: str
    uid: int
    pid: int = 0


class Sessions:
    """Tokens given out by this instance of the daemon; the oldest go when there are too many."""

    def __init__(self, allow_group: str | None) -> None:
        self._tokens: OrderedDict[str, Identity] = OrderedDict()
        self._lock = threading.Lock()
        self._group = grp.getgrnam(allow_group) if allow_group else None

    def __len__(self) -> int:
        return len(self._tokens)

    def open(self, identity: Identity) -> str:
        """A new token for ``identity``."""
        token = secrets.token_hex(16)
        with self._lock:
            self._tokens[token] = identity
            while len(self._tokens) > _MOST:
                self._tokens.popitem(last=False)
        return token

    def identify(self, token: str) -> Identity:
        """Who holds ``token``; SessionExpired when this instance never gave it out."""
        identity = self._tokens.get(token)
        if identity is None:
            raise SessionExpired(
                "no session with this daemon", "open one on the fd socket; the client does so by itself"
            )
        return identity

    def check(self, identity: Identity, owner: str, run: str) -> None:
        """NotPermitted unless ``identity`` may touch a run of ``owner``: its own, an operator, or a group member."""
        if identity.name == owner or identity.name in ("uid:0", f"uid:{os.getuid()}"):
            return
        if self._group and self._is_member(identity.uid):
            return
        raise NotPermitted(f"run {run} belongs to {owner}, you are {identity.name}")

    def check_peer(self, identity: Identity) -> None:
        """NotPermitted unless ``identity`` may be another daemon: a certificate of the authority, or the same user."""
        if not identity.name.startswith("cert:") and identity.name not in ("uid:0", f"uid:{os.getuid()}"):
            raise NotPermitted(f"only daemons ask this of one another, you are {identity.name}", "")

    def _is_member(self, uid: int) -> bool:
        if self._group is None:
            return False
        try:
            user = pwd.getpwuid(uid)
        except KeyError:
            return False
        return user.pw_gid == self._group.gr_gid or user.pw_name in self._group.gr_mem
