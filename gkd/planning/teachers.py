"""What a teacher takes of memory, time and links, by where it is.

A further placement is a class here, with its name in the table.
"""

from __future__ import annotations

import math

from gkd.planning.links import Link, collective
from gkd.planning.models import DTYPE_BYTES
from gkd.planning.setup import Setup

Bytes = dict[str, float]


class TeacherPlace:
    """Whole, on every training device."""

    def resident(self, setup: Setup) -> Bytes:
        """On a training device, in every phase. The loss needs the teacher's head wherever the teacher is."""
        return {"teacher weights": setup.teacher_bytes}

    def scoring(self, setup: Setup) -> Bytes:
        """On a training device while texts are scored, beside their hidden states."""
        return {"teacher activations": _activation_bytes(setup)}

    def served_bytes(self, setup: Setup) -> float:
        """On each of its own devices, if it has any."""
        return 0.0

    def sequences(self, setup: Setup) -> float:
        """How many a device scores in a step."""
        return setup.local_sequences

    def devices_as_one(self, setup: Setup) -> int:
        """How many devices read the weights once together."""
        return 1

    def states_bytes(self, setup: Setup) -> float:
        """Hidden states that the loss will use, of all of a rank's sequences at their longest."""
        sequences = max(1.0, setup.local_sequences)
        return sequences * _sequence_bytes(setup, setup.max_new_tokens, setup.longest_tokens)

    def links(self, setup: Setup) -> list[Link]:
        return [Link(_STATES, "device", _sent_bytes(setup), 0.0)]


class _Sharded(TeacherPlace):
    """A share on every training device, of which a layer at a time is gathered."""

    def resident(self, setup: Setup) -> Bytes:
        width = DTYPE_BYTES[setup.teacher_dtype]
        layer = width * setup.teacher.matrix_parameters(setup.teacher.experts) / setup.teacher.layers
        return {
            "teacher weights": setup.teacher_bytes / setup.devices,
            **_head(setup),
            "teacher gathered layers": 2 * layer,  # one is used while the next arrives
        }

    def links(self, setup: Setup) -> list[Link]:
        micro_batches = math.ceil(setup.local_sequences / setup.scoring_micro_batch_size)
        size_bytes, messages = micro_batches * setup.teacher_bytes, micro_batches * setup.teacher.layers
        return [*super().links(setup), collective(setup, "teacher's weights", size_bytes, messages)]


class _Served(TeacherPlace):
    """On devices of its own, which work as one."""

    def resident(self, setup: Setup) -> Bytes:
        return _head(setup)

    def scoring(self, setup: Setup) -> Bytes:
        return {}

    def served_bytes(self, setup: Setup) -> float:
        """A device's share of the weights, and a micro-batch's activations."""
        return setup.teacher_bytes / setup.teacher_devices + _activation_bytes(setup)

    def sequences(self, setup: Setup) -> float:
        return setup.batch_size / setup.teacher_devices

    def devices_as_one(self, setup: Setup) -> int:
        return setup.teacher_devices

    def links(self, setup: Setup) -> list[Link]:
        rate, states = setup.device.network_bytes_per_s * setup.device.efficiency.link, _sent_bytes(setup)
        return [Link(_STATES, "network", states, states / rate)]


class _Student(TeacherPlace):
    """In the student, which scores itself."""

    def resident(self, setup: Setup) -> Bytes:
        return {}


class _Mean(TeacherPlace):
    """The mean of the student's weights, in float32 on every training device."""

    def resident(self, setup: Setup) -> Bytes:
        return {"mean of the student's weights": 4.0 * setup.student.parameters}


class _Unasked(TeacherPlace):
    """Nowhere."""

    def resident(self, setup: Setup) -> Bytes:
        return {}

    def scoring(self, setup: Setup) -> Bytes:
        return {}

    def sequences(self, setup: Setup) -> float:
        return 0.0

    def states_bytes(self, setup: Setup) -> float:
        return 0.0

    def links(self, setup: Setup) -> list[Link]:
        return []


_STATES = "teacher's hidden states"
_PLACES: dict[str, TeacherPlace] = {
    "local": TeacherPlace(),
    "sharded": _Sharded(),
    "served": _Served(),
    "unasked": _Unasked(),
    "student": _Student(),
    "mean": _Mean(),
}


def teacher_place(setup: Setup) -> TeacherPlace:
    return _PLACES[setup.teacher_placement]


def _head(setup: Setup) -> Bytes:
    return {"teacher head": setup.teacher.embedding_parameters * DTYPE_BYTES[setup.teacher_dtype]}


def _activation_bytes(setup: Setup) -> float:
    tokens = setup.scoring_micro_batch_size * setup.teacher_longest_tokens
    return setup.teacher.inference_bytes(setup.teacher_dtype) * tokens


def _sent_bytes(setup: Setup) -> float:
    """Of a step's sequences of a training device."""
    return setup.local_sequences * _sequence_bytes(setup, setup.completion_tokens, setup.mean_tokens)


def _sequence_bytes(setup: Setup, scored_tokens: float, tokens: float) -> float:
    """States of one sequence: the last ones of its scored tokens, and what terms ask of layers."""
    of_scored, of_all = setup.state_widths
    elements = scored_tokens * (setup.teacher.hidden + of_scored) + tokens * of_all
    return elements * DTYPE_BYTES[setup.teacher_dtype]
