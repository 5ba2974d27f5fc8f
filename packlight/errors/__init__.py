"""Every error that Packlight raises for something its user can change.

Each one says what, where and the numbers, carries those numbers as attributes, and ends in a hint
that was computed. `str(error)` is meant to be read on a terminal.
"""

from packlight.errors.base import PacklightError as PacklightError
from packlight.errors.models import BatchError as BatchError
from packlight.errors.models import GraphBreakError as GraphBreakError
from packlight.errors.models import LossScaleError as LossScaleError
from packlight.errors.models import MicrobatchError as MicrobatchError
from packlight.errors.models import NonFiniteLossError as NonFiniteLossError
from packlight.errors.models import PrecisionError as PrecisionError
from packlight.errors.models import UnsupportedModelError as UnsupportedModelError
from packlight.errors.parameters import OptimizerStateError as OptimizerStateError
from packlight.errors.parameters import SparsePatternError as SparsePatternError
from packlight.errors.parameters import SparseTensorError as SparseTensorError
from packlight.errors.parameters import SparsityError as SparsityError
from packlight.errors.parameters import UnsupportedParameterError as UnsupportedParameterError
from packlight.errors.plans import BudgetFormatError as BudgetFormatError
from packlight.errors.plans import FormatError as FormatError
from packlight.errors.plans import InfeasibleBudgetError as InfeasibleBudgetError
from packlight.errors.plans import MissingExtraError as MissingExtraError
from packlight.errors.plans import MoveError as MoveError
from packlight.errors.plans import OffloadError as OffloadError
from packlight.errors.plans import OptionError as OptionError
from packlight.errors.plans import ScheduleError as ScheduleError
from packlight.errors.plans import WayError as WayError
from packlight.errors.ranks import ClusterPlanError as ClusterPlanError
from packlight.errors.ranks import PipelineError as PipelineError
from packlight.errors.ranks import RankError as RankError
from packlight.errors.ranks import RankMismatchError as RankMismatchError
from packlight.errors.studies import MemberError as MemberError
from packlight.errors.studies import NoFeasibleTrialError as NoFeasibleTrialError
