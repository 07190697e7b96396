"""Curvature of the loss, per component: traces, both spectral ends, couplings, with their errors.

One estimator a file. All of them work on an `Operator`, such as a `Hessian` made from a loss with a
live graph or what a `ProbeSet` makes, and return `diagnoser.types.Estimate`.
"""

from diagnoser.curvature.along import (
    Coupling,
    RowCurvature,
    block_curvature,
    coupling_matrix,
    row_curvature,
)
from diagnoser.curvature.block_trace import block_trace
from diagnoser.curvature.coupling import coupling_norm, coupling_norms
from diagnoser.curvature.decision import Question, answer, decided
from diagnoser.curvature.finite_difference import CentralDifference
from diagnoser.curvature.fused_attention import second_derivative_of_fused_attention
from diagnoser.curvature.hessian import ON_A_PROBE, Hessian, NoSecondDerivativeError
from diagnoser.curvature.lanczos import (
    Ends,
    block_eigenvalues,
    extreme_eigenvalues,
    largest_eigenvalues,
    precondition,
)
from diagnoser.curvature.memory import out_of_memory
from diagnoser.curvature.operator import Block, Operator, Vector
from diagnoser.curvature.per_sample import (
    Direction,
    RandomSigns,
    SampleForms,
    batch_error,
    forms_along,
    forms_of,
)
from diagnoser.curvature.probe import ProbeSet
from diagnoser.curvature.random_states import RandomStates
from diagnoser.curvature.replay import CompiledCalls, ReplayHessian, compiled_nodes
from diagnoser.curvature.self_checks import (
    communicating_nodes,
    finite_difference_defect,
    recomputes,
    repetition_defect,
    symmetry_defect,
    unreliable_nodes,
    unverified_nodes,
)
from diagnoser.curvature.sharded import ShardedAlong, sharded_row_curvature
from diagnoser.curvature.streamed import StreamedHessian

__all__ = [
    "ON_A_PROBE",
    "Block",
    "CentralDifference",
    "CompiledCalls",
    "Coupling",
    "Direction",
    "Ends",
    "Hessian",
    "NoSecondDerivativeError",
    "Operator",
    "ProbeSet",
    "Question",
    "RandomSigns",
    "RandomStates",
    "ReplayHessian",
    "RowCurvature",
    "SampleForms",
    "ShardedAlong",
    "StreamedHessian",
    "Vector",
    "answer",
    "batch_error",
    "block_curvature",
    "block_eigenvalues",
    "block_trace",
    "communicating_nodes",
    "compiled_nodes",
    "coupling_matrix",
    "coupling_norm",
    "coupling_norms",
    "decided",
    "extreme_eigenvalues",
    "finite_difference_defect",
    "forms_along",
    "forms_of",
    "largest_eigenvalues",
    "out_of_memory",
    "precondition",
    "recomputes",
    "repetition_defect",
    "row_curvature",
    "second_derivative_of_fused_attention",
    "sharded_row_curvature",
    "symmetry_defect",
    "unreliable_nodes",
    "unverified_nodes",
]
