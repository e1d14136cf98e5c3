"""What every job shares: config from YAML and flags, paths under DERMRAY_HOME, one JSON line last, one-line errors.

A job file holds a pydantic config, a `run(config) -> dict` and `if __name__ == "__main__": run_job(...)`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from modeling.locations import REPO_ROOT, SUBMITTED, LocationMarker, dermray_home, resolve_location
from modeling.locations import Location as Location  # for the jobs
from store.errors import StoreUnavailableError


class JobConfig(BaseModel):
    """Base of all job configs: unknown keys are errors, and default locations are resolved like given ones."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


Config = TypeVar("Config", bound=BaseModel)


def _models_of(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        for part in typing.get_args(annotation):
            yield from _models_of(part)


def _is_location(annotation: Any, metadata: typing.Iterable[Any]) -> bool:
    if any(isinstance(item, LocationMarker) for item in metadata):
        return True
    if typing.get_origin(annotation) is Annotated:
        return any(isinstance(item, LocationMarker) for item in typing.get_args(annotation)[1:])
    return any(_is_location(part, ()) for part in typing.get_args(annotation))


def _flag_value(model: type[BaseModel], dotted: str, text: str) -> Any:
    """Parses a flag's text as YAML, or keeps it as a path where the field is one."""
    head, _, rest = dotted.partition(".")
    field = model.model_fields.get(head)
    if field is not None and rest:
        for nested in _models_of(field.annotation):
            return _flag_value(nested, rest, text)
    if field is not None and not rest and _is_location(field.annotation, field.metadata):
        if text in ("null", "none", ""):
            return None
        base = dermray_home() if os.environ.get(SUBMITTED) else Path.cwd()
        return resolve_location(text, base)
    if field is not None and not rest and str in (field.annotation, *typing.get_args(field.annotation)):
        # `--model 7` and `--reason "retrained: more sites"` are text, whatever YAML would make of them.
        return None if text == "null" and field.annotation is not str else text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        # ValueError: what looks like a date and is none (2026-02-30); the field's own check says what it expects.
        return text


def _merge(target: dict[str, Any], dotted: str, value: Any) -> None:
    head, _, rest = dotted.partition(".")
    if not rest:
        target[head] = value
        return
    inner = target.setdefault(head, {})
    if not isinstance(inner, dict):
        raise ValueError(f"flag --{dotted}: {head} is {inner!r}, not a group of fields")
    _merge(inner, rest, value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        ValueError: missing, not YAML, or not a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"config file {path} holds a {type(data).__name__}; expected a mapping of fields")
    return data


def parse_config(model: type[Config], argv: list[str], default_file: Path | None = None) -> Config:
    """Builds a config from `--config FILE` and `--field value` / `--field=value` flags, flags winning.

    Field names use underscores or hyphens; nested fields are dotted (`--model.input-size 128`).
    """
    values: dict[str, str] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"argument {flag!r}: expected --field value")
        name, has_value, value = flag[2:].partition("=")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                value = "true"
            else:
                value = rest.pop(0)
        values[name.replace("-", "_")] = value
    chosen = values.pop("config", None)
    file = Path(chosen) if chosen is not None else default_file
    data = read_yaml(file) if file is not None else {}
    for name, text in values.items():
        _merge(data, name, _flag_value(model, name, text))
    return model.model_validate(data)


def validation_lines(error: ValidationError) -> str:
    """One line that names each wrong field, its value and what was expected."""
    parts = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or error.title
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown config key {field!r}")
        elif item["type"] == "missing":
            parts.append(f"config key {field!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
            parts.append(f"{field}{value}: {message}")
    return "; ".join(parts)


def say(message: str) -> None:
    """One progress line on stderr (stdout's last line is the result)."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def _usage(verb: str, model: type[BaseModel], module_doc: str | None) -> str:
    lines = [
        f"python -m ray_jobs.{verb} [--config FILE] [--field value ...]",
        "",
        (module_doc or "").strip(),
        "",
        "fields:",
    ]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  --{name}  {field.description or ''} ({default})"[:200])
    return "\n".join(lines)


def _fail(verb: str, message: str, code: int) -> NoReturn:
    print(f"{verb}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if os.environ.get("DERMRAY_DEBUG"):
        traceback.print_exc()
    raise SystemExit(code)


def run_job(verb: str, model: type[Config], run: Callable[[Config], dict[str, Any]], doc: str | None = None) -> None:
    """Parses, runs, prints the result as one JSON line last.

    Exit 2: the user's mistake, or a store that is locked, full or down; one line, no traceback.

    DERMRAY_DEBUG=1 adds the traceback. Any other failure keeps its traceback and exits with 1.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(_usage(verb, model, doc))
        return
    # MLflow and Evidently phone home unless told otherwise; patient data may be in reach of this process.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    default_file = REPO_ROOT / "configs" / f"{verb}.yaml"
    started = time.monotonic()
    try:
        config = parse_config(model, sys.argv[1:], default_file if default_file.exists() else None)
        result = run(config)
    except ValidationError as error:
        _fail(verb, validation_lines(error), 2)
    except (ValueError, FileNotFoundError, StoreUnavailableError) as error:
        _fail(verb, str(error), 2)
    sys.stderr.flush()
    print(json.dumps({"verb": verb, "seconds": round(time.monotonic() - started, 1), **result}), flush=True)


def connect_ray(num_cpus: int | None = None) -> None:
    """Connects to the cluster of RAY_ADDRESS (or of the submitted job), else starts a private one in this process."""
    import ray

    if ray.is_initialized():
        return
    home = str(dermray_home())
    os.environ["DERMRAY_HOME"] = home
    environment = {"env_vars": {"DERMRAY_HOME": home}}
    if os.environ.get(SUBMITTED):
        # The job's own environment holds DERMRAY_HOME; Ray refuses a variable that is given twice.
        ray.init(log_to_driver=True, logging_level="warning")
    elif os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=environment, log_to_driver=True, logging_level="warning")
    else:
        # Without its dashboard, Ray Train's cleaner of placement groups finds no state API and complains every second.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            runtime_env=environment,
            logging_level="warning",
        )
