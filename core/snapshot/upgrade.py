"""The versions of a template's components, and how an old one becomes a new one.

A kind's number in ``current`` goes up with every change of its bytes, and a step from the old number to the new one
joins ``_STEPS``. Steps are never removed: tests/golden has a template of each version that was ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from motorcade.proto.template import Component, TemplateError

Step = Callable[[bytes], bytes]
"""A component's data of one version to that of the next. ValueError where it is none of that version."""

current: dict[str, int] = {
    "vm": 1,
    "clock": 1,
    "vcpu": 1,
    "uart": 1,
    "pm": 2,  # 2: event bit 2, a change of the virtio-mmio slots
    "rtc": 1,
    "virtio": 1,
    "sidecar": 1,
}
"""Kind of component (its name up to the dot) to the version that this program writes."""

_STEPS: dict[tuple[str, int], Step] = {("pm", 1): lambda data: data}
"""Kind and version to the step that leads on from it."""


def upgrade(
    component: Component, versions: Mapping[str, int] = current, steps: Mapping[tuple[str, int], Step] = _STEPS
) -> Component:
    """``component`` in the version that this program writes.

    Errors: TemplateError, with the component's name, for a kind that this program does not know, a newer version, and
    data that is not what its version says.
    """
    newest = versions.get(component.kind)
    if newest is None:
        raise TemplateError(f"component {component.name} is of no kind that this program knows")
    if component.version > newest:
        raise TemplateError(
            f"component {component.name} has version {component.version}, newer than this program, "
            f"which knows up to {newest}"
        )
    data = component.data
    for version in range(component.version, newest):
        try:
            data = steps[component.kind, version](data)
        except ValueError as e:
            raise TemplateError(f"component {component.name}, from version {version} to {version + 1}: {e}") from e
    return Component(component.name, newest, data)
