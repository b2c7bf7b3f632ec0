"""Units of a model (heads, channels, experts, blocks), and gates on them."""

from billhook.units.blocks import block_of, find_blocks, hidden_states, returned_states, skipping
from billhook.units.find import (
    Chosen,
    check_any,
    check_belongs,
    find_heads,
    find_units,
    kinds_of,
    of_kind,
    unit_ids,
    units_of,
    why_none,
)
from billhook.units.gates import Gate, Mask, consumer_columns, mask, place_gates, zero_units
from billhook.units.units import PLURAL, Part, Per, UnitKind, UnitNumbers, Units, UnitsByModule, counts, parts_of, plural
