"""The questions that only tests ask of a layout."""

from penstock.engine.model.group_layout import GroupLayout
from penstock.engine.model.layout import ModelLayout
from penstock.scheduler.passes.pass_plan import GroupId


def by_group(layout: ModelLayout) -> dict[GroupId, GroupLayout]:
    return {group.id: group for group in layout.groups}
