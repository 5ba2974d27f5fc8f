"""From a step and a budget to the fastest schedule that fits. No torch."""

from packlight.planner.bound import lower_bound_seconds
from packlight.planner.plain import plain_schedule, schedule_from_order
from packlight.planner.plan import Planner, least_peak_bytes, pareto, plan_schedule, smallest_plan
from packlight.planner.whole_step import plan_whole_step

__all__ = [
    "Planner",
    "least_peak_bytes",
    "lower_bound_seconds",
    "pareto",
    "plain_schedule",
    "plan_schedule",
    "plan_whole_step",
    "schedule_from_order",
    "smallest_plan",
]
