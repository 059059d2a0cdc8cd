"""Options from a YAML file: ``vmalloc serve --config FILE.yaml``.

Owns: nothing.  Thread-safety: none; one process, one command.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from .errors import ConfigError

_NOT_IN_A_FILE = {"--config", "--help"}


def read_config_option(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: what the file says becomes the defaults of the other options.

    Raises ``ConfigError`` naming the file, and the option that is unknown or has no such value.
    """
    if path is not None and not context.resilient_parsing:
        context.default_map = _defaults(context, path)
    return path


def _defaults(context: typer.Context, path: Path) -> dict[str, Any]:
    """Values by parameter name, as the command line would bring them."""
    options: dict[str, Any] = {}
    for parameter in context.command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name.startswith("--") and name not in _NOT_IN_A_FILE:
                options[name.removeprefix("--")] = parameter
    defaults: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = str(key).replace("_", "-")
        if name not in options:
            raise ConfigError(f"config file {str(path)!r} has {str(key)!r}{_hint(name, options)}")
        if value is None:
            continue
        parameter = options[name]
        if parameter.name in defaults:
            raise ConfigError(f"config file {str(path)!r} has {name!r} twice")
        defaults[parameter.name] = _checked(path, name, parameter, value)
    return defaults


def _hint(name: str, options: dict[str, Any]) -> str:
    close = get_close_matches(name, options, n=1)
    return "; there is no such option" + (f"; did you mean {close[0]!r}?" if close else "")


def _load(path: Path) -> dict[Any, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("--config needs PyYAML: pip install 'vmalloc[server]'") from error
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file is {str(path)!r}; it cannot be read: {reason}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"config file {str(path)!r} holds a {type(document).__name__}; it must be lines of "
            "'name: value'"
        )
    return document


def _checked(path: Path, name: str, parameter: Any, value: Any) -> Any:
    """The value as text, so that the command line's own checks apply to it."""
    where = f"config file {str(path)!r}: {name} is {value!r}"
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}; it must be true or false")
        return value != (f"--{name}" in parameter.secondary_opts)
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not parameter.multiple:
        raise ConfigError(f"{where}; it takes one value")
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ConfigError(f"{where}; it must be text or a number")
    texts = [str(one) for one in values]
    return texts if parameter.multiple else texts[0]
