"""Configurations: strict, and the same after a round trip through JSON and TOML."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from convlstm_vo.config import ConfigError, read_json, read_toml, to_dict, update


@dataclasses.dataclass(frozen=True)
class Inner:
    size: tuple[int, int] = (3, 4)
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    names: tuple[str, ...] = ()
    rate: float = 1.0
    count: int = 1
    folder: Path | None = None
    flag: bool = False


CHANGED = Outer(Inner((5, 6), "b"), ("00", "02"), 0.5, 7, Path("somewhere"), True)


def test_json_round_trip() -> None:
    assert update(Outer(), json.loads(json.dumps(to_dict(CHANGED))), "test") == CHANGED
    assert update(CHANGED, to_dict(Outer()), "test") == Outer()


def test_toml_recipes_hold_differences_only(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('rate = 2\nnames = ["08"]\n[inner]\nkind = "b"\n')
    changed = update(Outer(), read_toml(recipe), str(recipe))
    assert changed == dataclasses.replace(Outer(), rate=2.0, names=("08",), inner=Inner(kind="b"))
    assert isinstance(changed.rate, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rat": 1}, "file: unknown key 'rat'; did you mean 'rate'?"),
        ({"zzz": 1}, "unknown key 'zzz'; known keys: inner, names"),
        ({"inner": {"siz": 1}}, "unknown key 'inner.siz'; did you mean 'size'?"),
        ({"count": 1.5}, "'count' is 1.5, but must be int"),
        ({"count": True}, "'count' is True, but must be int"),
        ({"rate": "fast"}, "'rate' is 'fast', but must be float"),
        ({"inner": {"kind": "c"}}, "'inner.kind' is 'c', but must be one of 'a', 'b'"),
        ({"inner": {"size": [1, 2, 3]}}, r"'inner.size' is \[1, 2, 3\], but must be"),
        ({"names": "00"}, "'names' is '00', but must be"),
        ({"flag": 1}, "'flag' is 1, but must be bool"),
    ],
)
def test_wrong_keys_and_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        update(Outer(), changes, "file")


def test_files_that_are_not_configurations(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ConfigError, match="no such recipe"):
        read_toml(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_json(path)
    path.write_text("= [")
    with pytest.raises(ConfigError, match="not a TOML file"):
        read_toml(path)
    with pytest.raises(ConfigError, match="not a JSON file"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold an object"):
        read_json(path)
