"""The one place where a config chooses the parts. Everything expensive starts here, cheap checks first."""

from gkd.train.deepspeed_config import check_precision
from gkd.train.parts.data import Pack, Prompts, Reduction, load_data, packer, prompt_data
from gkd.train.parts.measures import build_answer_scoring, build_heldout, shown_requests
from gkd.train.parts.models import Models, locate_models
from gkd.train.parts.sampling import build_rollouts, build_sampler
from gkd.train.parts.settings import sampler_spec, sampling_settings
from gkd.train.parts.student import build_checkpoints, build_student, checkpoint_layout, resume_step
from gkd.train.parts.teachers import build_teacher
from gkd.train.parts.texts import TeacherTexts, teacher_texts

__all__ = [
    "Models",
    "Pack",
    "Prompts",
    "Reduction",
    "TeacherTexts",
    "build_answer_scoring",
    "build_checkpoints",
    "build_heldout",
    "build_rollouts",
    "build_sampler",
    "build_student",
    "build_teacher",
    "check_precision",
    "checkpoint_layout",
    "load_data",
    "locate_models",
    "packer",
    "prompt_data",
    "resume_step",
    "sampler_spec",
    "sampling_settings",
    "shown_requests",
    "teacher_texts",
]
