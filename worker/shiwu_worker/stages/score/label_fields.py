"""What the two versions of label files share."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field

from shiwu.contract import control_character

MAX_FILE_LABELS: Final = 100_000
MAX_LOGIT: Final = 1000.0


def _check_templates(templates: list[str]) -> list[str]:
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"expected exactly one {{}} in every template, got {template!r:.80}")
        if found := control_character(template):
            raise ValueError(f"expected templates without control characters, got {found} in {template!r:.80}")
    return templates


def _as_items(labels: object) -> object:
    """Labels that are written as a text are those without any further key."""
    if not isinstance(labels, list):
        return labels
    return [{"label": item} if isinstance(item, str) else item for item in labels]


TemplateList = Annotated[list[str], Field(min_length=1, max_length=200), AfterValidator(_check_templates)]
AS_ITEMS: Final = BeforeValidator(_as_items)
LABEL_COUNT: Final = Field(min_length=1, max_length=MAX_FILE_LABELS)
Scale = Annotated[float, Field(gt=0, le=MAX_LOGIT)]
Bias = Annotated[float, Field(ge=-MAX_LOGIT, le=MAX_LOGIT)]
