"""Why a claim cannot be tested here."""

from __future__ import annotations

from lt_core.errors import LTError


class Untestable(LTError):
    """Something that a claim needs does not exist; the message names what it would take."""
