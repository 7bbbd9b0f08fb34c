"""Multi-Head Low-Rank Attention for Hugging Face Transformers; importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_mlra import MLRACache
from .configuration_mlra import MLRAConfig
from .modeling_mlra import (
    MLRAForCausalLM,
    MLRAForQuestionAnswering,
    MLRAForSequenceClassification,
    MLRAForTokenClassification,
    MLRAModel,
    MLRAPreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register("mlra", MLRAConfig, exist_ok=True)
MLRAConfig.register_for_auto_class()
for auto_class, model_class in {
    AutoModel: MLRAModel,
    AutoModelForCausalLM: MLRAForCausalLM,
    AutoModelForQuestionAnswering: MLRAForQuestionAnswering,
    AutoModelForSequenceClassification: MLRAForSequenceClassification,
    AutoModelForTokenClassification: MLRAForTokenClassification,
}.items():
    auto_class.register(MLRAConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "MLRACache",
    "MLRAConfig",
    "MLRAForCausalLM",
    "MLRAForQuestionAnswering",
    "MLRAForSequenceClassification",
    "MLRAForTokenClassification",
    "MLRAModel",
    "MLRAPreTrainedModel",
]
