"""The JSON schema of a recipe file, from which editors complete recipes."""

from __future__ import annotations

from typing import Any

from modelzip.compressors.settings import MethodSettings

from .schema import STAGES, Recipe, Rule, Stage


def recipe_schema() -> dict[str, Any]:
    """The schema of the YAML, in which stages and rules are flat mappings."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    schema["$defs"] = {name: definitions[name] for name in ("Calibration", "Evaluation", "Export")}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "modelzip recipe"
    schema["required"] = ["stages"]
    schema["properties"]["stages"] = {
        "type": "array",
        "minItems": 1,
        "description": "What is done, in this order.",
        "items": {"anyOf": [_stage(kind, cls) for kind, cls in STAGES.items()]},
    }
    for one in (schema, *schema["$defs"].values()):
        _without_own_keys(one)
    return schema


def _stage(kind: str, cls: type[Stage]) -> dict[str, Any]:
    methods = {"anyOf": [_settings(cls, name, method) for name, method in cls.methods.items()]}
    return {"type": "object", "additionalProperties": False, "required": [kind], "properties": {kind: methods}}


def _settings(cls: type[Stage], name: str, method: type[MethodSettings]) -> dict[str, Any]:
    schema = _without_own_keys(method.model_json_schema())
    changeable = {key: value for key, value in schema["properties"].items() if key not in method.whole_stage}
    changeable = {key: {k: v for k, v in value.items() if k != "default"} for key, value in changeable.items()}
    rule = _without_own_keys(Rule.model_json_schema())
    rule["properties"] = {"match": rule["properties"]["match"], "skip": rule["properties"]["skip"], **changeable}
    for key, field in cls.model_fields.items():
        if key == "output":
            schema["properties"][key] = {"type": "string", "description": field.description}
        elif key != "settings":
            items = rule if key == "rules" else {"type": "string"}
            schema["properties"][key] = {"type": "array", "description": field.description, "items": items}
    schema["description"] = f"{method.summary} {method.citation}"
    schema["required"] = [*([] if name == cls.default_method else ["method"]), *schema.get("required", ())]
    return schema


def _without_own_keys(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that only our own sentences and options need."""
    for one in schema["properties"].values():
        for key in ("allowed", "negative"):
            one.pop(key, None)
    return schema
