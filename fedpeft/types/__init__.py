"""The vocabulary of fedpeft: the records that pass between its layers and one protocol per family.

A method is a frozen dataclass in ``fedpeft/<family>/<name>.py`` that satisfies the family's
protocol. What its fields are is its configuration; what it offers to and needs of other parts it
says with three optional mappings from a trait to a reason::

    offers  = {"labels": "every record has one"}           # what others may rely on
    needs   = {"plain-sgd": "divides the update by lr"}    # some other part must offer it
    refuses = {"reads-single-updates": "adds noise to sums"}   # no other part may offer it

``Plan`` compares them and knows no method by name. What needs single clients' updates in the clear
at the server, because their weighted sum is not enough, offers ``reads-single-updates``; what hides
or noises updates refuses it. Aggregators to which the sum is enough offer ``linear``.
"""

from fedpeft.types.adapters import Adapter, Informed, Narrowing, Probing, Ranked, Restarting, Roles
from fedpeft.types.aggregation import (
    Aggregator,
    Asking,
    Bounded,
    Folding,
    Learning,
    Observing,
    Recalling,
    Sent,
    ServerOptimizer,
    Step,
    Update,
    Weighting,
    Weights,
)
from fedpeft.types.basics import (
    FEATURES,
    Example,
    Metrics,
    Population,
    Rng,
    Row,
    Scalar,
    Shapes,
    Stacked,
    Tensors,
)
from fedpeft.types.codecs import Codec, Compensating, Differing, Packet
from fedpeft.types.corrections import Correction, Local
from fedpeft.types.data import (
    Carrying,
    Filed,
    Hubbed,
    Partition,
    Pathed,
    Scattered,
    Source,
    Splits,
    Task,
)
from fedpeft.types.models import Attached, Batch, Dropout, Learner
from fedpeft.types.presets import Preset
from fedpeft.types.privacy import Privacy, Rationed
from fedpeft.types.sampling import Cohort, Drawn, Sampled, Sampling
from fedpeft.types.schedules import Converting, Flight, Schedule, Stale, Standing
from fedpeft.types.search import Point, Range, Repeating, Search, Space, Trial
from fedpeft.types.simulation import Availability, Crowd, Latency, Presence, Simulation
from fedpeft.types.tracking import Tracked, Tracker, Tracking
from fedpeft.types.training import Fit, Job, Paced, Personal, Summing, Trainer

__all__ = [
    "FEATURES",
    "Adapter",
    "Aggregator",
    "Asking",
    "Attached",
    "Availability",
    "Batch",
    "Bounded",
    "Codec",
    "Cohort",
    "Compensating",
    "Converting",
    "Correction",
    "Crowd",
    "Differing",
    "Drawn",
    "Dropout",
    "Example",
    "Filed",
    "Carrying",
    "Pathed",
    "Fit",
    "Flight",
    "Folding",
    "Hubbed",
    "Informed",
    "Job",
    "Latency",
    "Learner",
    "Learning",
    "Local",
    "Metrics",
    "Narrowing",
    "Observing",
    "Paced",
    "Packet",
    "Partition",
    "Point",
    "Personal",
    "Population",
    "Presence",
    "Preset",
    "Privacy",
    "Probing",
    "Ranked",
    "Range",
    "Repeating",
    "Rationed",
    "Recalling",
    "Restarting",
    "Rng",
    "Roles",
    "Row",
    "Sampled",
    "Sampling",
    "Scalar",
    "Scattered",
    "Schedule",
    "Search",
    "Sent",
    "ServerOptimizer",
    "Shapes",
    "Simulation",
    "Source",
    "Space",
    "Splits",
    "Stacked",
    "Stale",
    "Standing",
    "Step",
    "Summing",
    "Task",
    "Tensors",
    "Tracked",
    "Tracker",
    "Tracking",
    "Trainer",
    "Trial",
    "Update",
    "Weighting",
    "Weights",
]
