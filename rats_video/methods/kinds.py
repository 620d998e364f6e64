"""Every method, by `method.kind`. A new one is a file here and a line below."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rats_video.methods.advdmd import AdvDmdConfig
from rats_video.methods.consistency import ConsistencyConfig
from rats_video.methods.custom import CustomMethodConfig
from rats_video.methods.dmd2 import Dmd2Config
from rats_video.methods.dollar import DollarConfig
from rats_video.methods.grpo import GrpoConfig
from rats_video.methods.imitation import ImitationConfig
from rats_video.methods.rats import RatsConfig
from rats_video.methods.refl import ReflConfig
from rats_video.methods.rtdmd import RtdmdConfig
from rats_video.methods.senseflow import SenseFlowConfig
from rats_video.methods.t2v_turbo import T2VTurboConfig

MethodConfig = Annotated[
    RatsConfig
    | ImitationConfig
    | ReflConfig
    | GrpoConfig
    | RtdmdConfig
    | Dmd2Config
    | SenseFlowConfig
    | AdvDmdConfig
    | ConsistencyConfig
    | T2VTurboConfig
    | DollarConfig
    | CustomMethodConfig,
    Field(discriminator="kind"),
]  # fmt: skip
