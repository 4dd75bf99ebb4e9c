"""How the renderer's kernels are compiled: once a machine, kept on disk."""

from __future__ import annotations

from typing import Any

import numba

# No kernel allocates, and without numba's reference counts (_nrt) passing arrays on costs nothing: shading is three
# times faster, as counting is atomic and happens at every call of every pixel.
_njit: Any = numba.njit
strict: Any = _njit(cache=True, nogil=True, error_model="numpy", _nrt=False)
# Rounding may differ between machines where that changes light by 1e-15; never where it would decide which of two
# surfaces is seen.
quick: Any = _njit(cache=True, nogil=True, error_model="numpy", _nrt=False, fastmath={"contract", "arcp", "nsz"})
# Put into their callers: a call hands over every field of every array on the stack, which at each texel costs more
# than the texel.
strict_inline: Any = _njit(cache=True, nogil=True, error_model="numpy", _nrt=False, forceinline=True)
quick_inline: Any = _njit(
    cache=True, nogil=True, error_model="numpy", _nrt=False, forceinline=True, fastmath={"contract", "arcp", "nsz"}
)
