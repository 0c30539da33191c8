"""A model that takes its time, so that a test can interrupt its training."""

from __future__ import annotations

import os
import time

from torch import Tensor

from credit.models.unet import UNet


class SlowUNet(UNet):
    """A step of training takes at least CREDIT_TEST_STEP_S seconds, asleep: the processor is free for other tests."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(float(os.environ.get("CREDIT_TEST_STEP_S", "0")))
        return super().forward(x)
