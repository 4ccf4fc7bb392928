"""From defaults, preset, TOML file and command line to one frozen Config, and back to TOML."""

import argparse
import json
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_plm.arguments import ArgumentParser
from megatron_plm.config.options import GROUPS, NONE, Config, option_fields
from megatron_plm.config.presets import PRESETS, preset_options
from megatron_plm.errors import UserError, suggestion


def build_parser(prog: str) -> ArgumentParser:
    """The parser of a training command: every option is a flag, absent unless typed."""
    parser = ArgumentParser(prog=prog, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="TOML file of options")
    parser.add_argument("--preset", metavar="NAME", help=f"model shape: {', '.join(PRESETS)}")
    parser.add_argument("--print-config", action="store_true", help="print the resolved options as TOML and stop")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for entry in option_fields().values():
        text = entry.help.replace("%", "%%") + (f": {' | '.join(entry.choices)}" if entry.choices else "")
        if entry.default is not None:
            text += f" (default: {entry.default})"
        if entry.type is bool:
            groups[entry.group].add_argument(entry.flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            several = entry.type is tuple
            groups[entry.group].add_argument(
                entry.flag,
                type=str if several else _number_or_none if entry.optional and entry.type is int else entry.type,
                choices=entry.choices,
                help=text,
                metavar="PREFIX" if several else entry.type.__name__.upper(),
                nargs="+" if several else None,
            )
    return parser


def load_config(argv: Sequence[str], *, prog: str = "launch/pretrain.sh") -> tuple[Config, bool]:
    """Resolve `argv`: defaults < preset < TOML < flags.

    Returns the configuration and whether `--print-config` was given. Raises UserError for an unknown or ill-typed
    key or flag; whether the values fit together is checked by `problems.problems`, once the world size is known.
    """
    known = option_fields()
    flags_typed = vars(build_parser(prog).parse(argv))
    print_config = flags_typed.pop("print_config", False)
    file_preset: str | None = None
    values: dict[str, Any] = {}
    config_path = flags_typed.pop("config", None)
    if config_path is not None:
        file_preset, values = read_toml(Path(config_path))
    place = "--preset" if "preset" in flags_typed else str(config_path)
    preset = flags_typed.pop("preset", file_preset)
    if preset is not None:
        shape = preset_options(preset, place=place)
        # A file of another preset, such as the config.toml of a run, would win, and leave little of the one asked for.
        for name in shape if file_preset not in (None, preset) else ():
            if values.get(name, shape[name]) != shape[name]:
                raise UserError(
                    f"--preset {preset}: --config {config_path} sets {name} to {values[name]} itself, the preset to "
                    f"{shape[name]}; leave out one of the two, or the file's [model] table"
                )
        values = {**shape, **values}
    for name, value in flags_typed.items():
        values[name] = known[name].check(value, known[name].flag)
    return config_from_values(values, preset=preset), print_config


def read_toml(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Read a TOML file of options; returns (preset or None, values by option name)."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a readable TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}") from None
    return parse_tables(content, place=str(path))


def parse_tables(content: dict[str, Any], *, place: str) -> tuple[str | None, dict[str, Any]]:
    """Check the tables of a TOML document against the known options."""
    known = option_fields()
    content = dict(content)
    preset = content.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise UserError(f"{place}: preset must be a string, not {preset!r}")
    values = {}
    for group, table in content.items():
        if group not in GROUPS or not isinstance(table, dict):
            home = f"; {group} belongs under [{known[group].group}]" if group in known else suggestion(group, GROUPS)
            raise UserError(f"{place}: unknown key {group!r}; expected preset or the tables {', '.join(GROUPS)}{home}")
        for name, value in table.items():
            entry = known.get(name)
            if entry is None or entry.group != group:
                home = f"; it belongs under [{entry.group}]" if entry else suggestion(name, _names(group))
                raise UserError(f"{place}: unknown key {name!r} under [{group}]{home}")
            values[name] = entry.check(value, place)
    return preset, values


def config_from_values(values: dict[str, Any], *, preset: str | None = None) -> Config:
    """Build the frozen Config from checked values by option name; options not named keep their defaults."""
    groups = {
        name: options(**{f.name: values[f.name] for f in fields(options) if f.name in values})
        for name, options in GROUPS.items()
    }
    return Config(preset=preset, **groups)


def to_toml(config: Config) -> str:
    """The configuration as TOML that `read_toml` reads back; options that are None are left out."""
    lines = []
    if config.preset is not None:
        lines.append(f"preset = {_toml_value(config.preset)}")
    for group, options in GROUPS.items():
        lines += ["", f"[{group}]"]
        chosen = getattr(config, group)
        for entry in fields(options):
            value = getattr(chosen, entry.name)
            if value is None and PRESETS.get(config.preset or "", {}).get(entry.name) is not None:
                value = NONE  # else the preset's would come back
            if value is not None:
                lines.append(f"{entry.name} = {_toml_value(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def from_toml(text: str, *, place: str) -> Config:
    """Read what `to_toml` wrote; every option stands in it, so presets need not be known any more."""
    preset, values = parse_tables(tomllib.loads(text), place=place)
    return config_from_values(values, preset=preset)


def _number_or_none(word: str) -> int | str:
    return word if word == NONE else int(word)


def _names(group: str) -> list[str]:
    return [entry.name for entry in option_fields().values() if entry.group == group]


def _toml_value(value: Any) -> str:
    # A JSON string, finite number or boolean is a TOML one, once characters beyond the BMP are left unescaped and the
    # one control character that JSON allows is escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
