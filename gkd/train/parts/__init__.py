"""The one place where a config chooses the parts. Everything expensive starts here, cheap checks first."""

from gkd.train.deepspeed_check import check_deepspeed
from gkd.train.parts.agreed import check_same_settings
from gkd.train.parts.cut import make_student
from gkd.train.parts.data import (
    Pack,
    Prompts,
    Reduction,
    audit_tokenizers,
    load_data,
    load_split,
    packer,
    prompt_data,
    step_packer,
)
from gkd.train.parts.inputs import run_inputs
from gkd.train.parts.measures import build_heldout, build_snapshots, describe_samples, shown_texts
from gkd.train.parts.models import Models, locate_models
from gkd.train.parts.sampling import (
    SourceStates,
    ahead_of_training,
    build_conversations,
    build_mixture,
    build_sampler,
    probe_texts,
    take_sampler,
)
from gkd.train.parts.settings import room_of_texts, sampler_spec, sampling_settings
from gkd.train.parts.student import build_checkpoints, build_student, checkpoint_layout, resume_step
from gkd.train.parts.teachers import build_means, build_teacher
from gkd.train.parts.texts import TeacherTexts, teacher_texts
from gkd.train.parts.together import SharedRollouts
from gkd.train.parts.translated import as_teacher, as_teacher_ends, for_student

__all__ = [
    "Models",
    "Pack",
    "Prompts",
    "Reduction",
    "SharedRollouts",
    "SourceStates",
    "TeacherTexts",
    "ahead_of_training",
    "as_teacher",
    "as_teacher_ends",
    "audit_tokenizers",
    "build_checkpoints",
    "build_conversations",
    "build_heldout",
    "build_means",
    "build_mixture",
    "build_sampler",
    "build_snapshots",
    "build_student",
    "build_teacher",
    "check_deepspeed",
    "check_same_settings",
    "checkpoint_layout",
    "describe_samples",
    "for_student",
    "load_data",
    "load_split",
    "locate_models",
    "make_student",
    "packer",
    "probe_texts",
    "prompt_data",
    "resume_step",
    "room_of_texts",
    "run_inputs",
    "sampler_spec",
    "sampling_settings",
    "shown_texts",
    "step_packer",
    "take_sampler",
    "teacher_texts",
]
