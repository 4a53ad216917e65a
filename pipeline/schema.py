"""The JSON schema of a run's configuration, for editors; generated from the configuration's classes."""

from typing import Any

from sstoken.pipeline.config import RunConfig
from sstoken.pipeline.sections import KINDS, SelectSection

SCHEMA_FILE = "sstoken.schema.json"
_NO_SWEEP = {"stage", *SelectSection.__annotations__, "protect", "examples", "params"}
"""Fields of a selection for which a list is no sweep: what it reads, and settings that are lists or mappings."""
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Return the schema of the YAML file, with every field's description, range and default.

    It checks keys, types and ranges as strictly as the configuration does. What only the run can know (that a
    checkpoint exists, that a method has a parameter) is left to `plan`.
    """
    whole = RunConfig.model_json_schema()
    definitions = whole.pop("$defs")
    steps = []
    for kind, section in KINDS.items():
        own = section.model_json_schema()
        definitions |= own.pop("$defs", {})
        own["properties"] = {"stage": {"const": kind, "description": "Which stage this step runs."}} | own[
            "properties"
        ]
        own["required"] = ["stage", *own.get("required", ())]
        if section is SelectSection:
            _take_lists(own)
        definitions[f"{kind}_step"] = own
        steps.append({"$ref": f"#/$defs/{kind}_step"})
    _take_lists(definitions[SelectSection.__name__])
    anchor = definitions["AnchorSection"]
    anchor["required"] = [name for name in anchor["required"] if name != "model"]  # defaults to encode's
    critical = definitions["CriticalSection"]
    critical["required"] = [name for name in critical["required"] if name != "checkpoint"]  # likewise
    step = {"oneOf": steps}
    # Repeated steps are not checked field by field: `{t}` may stand for any number.
    repeated = {"type": "object", "properties": {"stage": {"enum": list(KINDS)}}, "required": ["stage"]}
    repeat = {
        "type": "object",
        "description": "Steps written once and run for each value: {t: [1, 2], steps: ...}; {t} stands for the value.",
        "properties": {"steps": {"type": "object", "additionalProperties": repeated}},
        "additionalProperties": {"type": "array", "items": {"type": "integer"}},
        "required": ["steps"],
    }
    whole["properties"]["steps"] |= {"properties": {"repeat": repeat}, "additionalProperties": step}
    for name in ("critical", "score", "select"):  # an empty section means the defaults
        whole["properties"][name] = {"anyOf": [whole["properties"][name], {"type": "null"}]}
    whole["oneOf"] = [{"required": ["encode"]}, {"required": ["steps"]}]
    return {"$schema": _DIALECT, **whole, "$defs": dict(sorted(definitions.items()))}


def _take_lists(section: dict[str, Any]) -> None:
    """Let each setting take a list of values, which makes a sweep."""
    about = ("description", "default", "title")
    for name, field in section["properties"].items():
        if name in _NO_SWEEP:
            continue
        one = {key: value for key, value in field.items() if key not in about}
        kept = {key: field[key] for key in about if key in field}
        section["properties"][name] = {**kept, "anyOf": [one, {"type": "array", "items": one}]}
