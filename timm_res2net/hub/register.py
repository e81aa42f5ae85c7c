"""Registers the Res2Net family with timm when transformers loads this model with trust_remote_code=True."""

from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    TimmWrapperModel,
)

try:
    import timm_res2net  # noqa: F401
except ImportError as error:
    raise ImportError('this model needs timm_res2net: run `pip install .` in a clone of its repository') from error


class Res2NetConfig(TimmWrapperConfig):
    pass


class Res2NetImageProcessor(TimmWrapperImageProcessor):
    pass


class Res2NetModel(TimmWrapperModel):
    config_class = Res2NetConfig


class Res2NetForImageClassification(TimmWrapperForImageClassification):
    config_class = Res2NetConfig
