"""Training over slow networks: compressed gradients in one interface, and steps without any.

    from packlight.comm import hook

    model = DistributedDataParallel(model)
    communication = hook(model, "topk:0.001+q2")

Every method is a `Compressor`: `init`, `compress`, `combine`, as optax's transforms are; what goes
around it (error feedback, momentum correction, delay) is one, too. All of it runs on
torch.distributed with gloo, and knows nothing of planning.
"""

from packlight.comm.average import CompressedAverage
from packlight.comm.compose import (
    Clip,
    Delayed,
    ErrorFeedback,
    MomentumCorrection,
    OneBitMomentum,
    dgc,
)
from packlight.comm.compressor import (
    Composition,
    Compressor,
    Message,
    Reduced,
    reduce_here,
)
from packlight.comm.ddp import Communication, hook
from packlight.comm.dense import Dense
from packlight.comm.local_steps import (
    LocalSteps,
    Schedule,
    diloco,
    fed_avg,
    post_local_sgd,
    streaming_diloco,
)
from packlight.comm.low_rank import GradZip, PowerSGD
from packlight.comm.one_bit_adam import OneBitAdam
from packlight.comm.parse import compressor_of
from packlight.comm.quantize import QSGD, Quantize, Sign, Ternary
from packlight.comm.sketch import CountSketch
from packlight.comm.sparse import RandomK, Threshold, TopK
from packlight.comm.transport import Transport
from packlight.comm.wire import WireCounter

__all__ = [
    "Clip",
    "Communication",
    "Composition",
    "CompressedAverage",
    "Compressor",
    "CountSketch",
    "Delayed",
    "Dense",
    "ErrorFeedback",
    "GradZip",
    "LocalSteps",
    "Message",
    "MomentumCorrection",
    "OneBitAdam",
    "OneBitMomentum",
    "PowerSGD",
    "QSGD",
    "Quantize",
    "RandomK",
    "Reduced",
    "Schedule",
    "Sign",
    "Ternary",
    "Threshold",
    "TopK",
    "Transport",
    "WireCounter",
    "compressor_of",
    "dgc",
    "diloco",
    "fed_avg",
    "hook",
    "post_local_sgd",
    "reduce_here",
    "streaming_diloco",
]
