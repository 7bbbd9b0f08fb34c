"""MLRA as a subject of the library's common test suite for causal LMs.

`scripts/run_library_suite.py` copies this file to where the library keeps the tests of its own models, so that the
relative imports below find the suite. It is of no use on its own.
"""

import copy
import unittest
from unittest import mock

import torch
from torch import nn
from transformers import StaticCache
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from modeling_mlra import (
    MLRAConfig,
    MLRAForCausalLM,
    MLRAForQuestionAnswering,
    MLRAForSequenceClassification,
    MLRAForTokenClassification,
    MLRAModel,
    MLRAPreTrainedModel,
)
from modeling_mlra.cache_mlra import MLRADynamicCache

from ... import test_fsdp_mixin, test_tensor_parallel_mixin
from ...causal_lm_tester import CausalLMModelTest, CausalLMModelTester

# The suite knows what a class is for by these tables of the library's own models.
for table, model_class in {
    "MODEL_MAPPING_NAMES": MLRAModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": MLRAForCausalLM,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": MLRAForQuestionAnswering,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": MLRAForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": MLRAForTokenClassification,
}.items():
    getattr(modeling_auto, table)[MLRAConfig.model_type] = model_class.__name__

# Several processes per test: the suite runs these for a list of the library's own models unless told otherwise.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

# Output projections start at zero, so that a fresh model does not attend at all: its tests would compare nothing.
initialize_as_released = MLRAPreTrainedModel._init_weights


@torch.no_grad()
def initialize_all(self, module):
    initialize_as_released(self, module)
    if getattr(module, "starts_at_zero", False):
        init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


MLRAPreTrainedModel._init_weights = initialize_all


class MLRAModelTester(CausalLMModelTester):
    config_class = MLRAConfig
    base_model_class = MLRAModel
    causal_lm_class = MLRAForCausalLM
    question_answering_class = MLRAForQuestionAnswering
    sequence_classification_class = MLRAForSequenceClassification
    token_classification_class = MLRAForTokenClassification

    def __init__(self, parent, **kwargs):
        settings = {
            "initializer_range": 0.1,  # so that attention reaches the outputs
            "num_latent_heads": 4,
            "num_branches": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        }
        super().__init__(parent, **(settings | kwargs))


class MLRAModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = MLRAModelTester
    model_split_percents = [0.5, 0.7, 0.8]
    _torch_compile_train_cls = MLRAForCausalLM

    def _get_attention_shape(self, batch_size, seq_length, config):
        """A cached row is the latents and one rotary key, whatever the number of heads."""
        rows = (batch_size, 1, seq_length)
        return (*rows, config.kv_lora_rank), (*rows, config.qk_rope_head_dim)

    def _check_attentions_for_generate(self, *args, attentions, config, **kwargs):
        """Every branch of a head is a distribution of its own, and the unused tail of a static cache is left out."""
        config = copy.deepcopy(config)
        config.num_attention_heads *= config.num_branches
        for cache in kwargs.values():  # its name depends on the version
            if isinstance(cache, StaticCache):
                width = cache.get_max_length()
                attentions = tuple(
                    tuple(nn.functional.pad(weights, (0, width - weights.shape[-1])) for weights in step)
                    for step in attentions
                )
        super()._check_attentions_for_generate(*args, attentions=attentions, config=config, **kwargs)

    def test_attention_outputs(self):
        inputs = self.model_tester.prepare_config_and_inputs_for_common()
        self.model_tester.num_attention_heads *= self.model_tester.num_branches  # as above
        with mock.patch.object(self.model_tester, "prepare_config_and_inputs_for_common", return_value=inputs):
            super().test_attention_outputs()

    if hasattr(CausalLMModelTest, "test_bc_cache_name_forward"):  # 5.24 and later

        def test_bc_cache_name_forward(self):
            """The test leaves out models whose cache is not exactly the library's: here it is the latent one."""
            with mock.patch("transformers.cache_utils.DynamicCache", MLRADynamicCache):
                super().test_bc_cache_name_forward()

    def _get_tiny_config(self):
        """The sizes of the mixin's own method, less the number of key heads, which follows from the others here."""
        config = self.model_tester.get_config()
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads = 256, 64, 128, 4
        return type(config), config.to_diff_dict()
