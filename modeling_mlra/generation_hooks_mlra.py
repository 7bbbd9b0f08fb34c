"""What `generate()` asks of a model: its cache, the width of its mask, and which loop decodes."""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationMixin

from .cache_mlra import MLRACache
from .capture_mlra import free_spares
from .forwards_mlra import captured_forwards
from .generation_mlra import can_capture, captured_decode
from .library_mlra import CACHE, take_cache, takes_cache_by_any_name
from .stepped_mlra import free_steps


class MLRAGenerationMixin(GenerationMixin):
    """The library's `generate()` on a latent cache, decoding in captured steps where it can."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Where the library would create its dynamic or static cache, create the latent one of the same kind."""
        given = take_cache(model_kwargs)
        if given is not None:
            model_kwargs[CACHE] = given
        elif generation_config.cache_implementation is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = MLRACache(self.config)
            model_kwargs[CACHE].made_for_call = True
            return None
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        chosen = model_kwargs.get(CACHE)
        if given is None and type(chosen) in (DynamicCache, StaticCache):
            model_kwargs[CACHE] = MLRACache(
                self.config,
                max_cache_len=chosen.layers[0].max_cache_len if isinstance(chosen, StaticCache) else None,
                offloading=chosen.offloading,
            )
            model_kwargs[CACHE].made_for_call = True
        return result

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Not with rows that move to the CPU and back: compiled, such steps end the process, for every model."""
        is_offloaded = getattr(model_kwargs.get(CACHE), "offloading", False)
        return not is_offloaded and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _sample(self, input_ids, *args, generation_config, synced_gpus=False, **kwargs):
        """Greedy decoding and sampling: the captured loop where it can run, else the library's."""
        settings = {"generation_config": generation_config, "synced_gpus": synced_gpus}
        if can_capture(self, input_ids, generation_config, kwargs, synced_gpus):
            return captured_decode(self, input_ids, *args, **settings, **kwargs)
        with captured_forwards(self, kwargs.get(CACHE), generation_config):
            return super()._sample(input_ids, *args, **settings, **kwargs)

    def _beam_search(self, *args, generation_config, **kwargs):
        """The library's beam search, its forwards captured where they can be."""
        with captured_forwards(self, kwargs.get(CACHE), generation_config):
            return super()._beam_search(*args, generation_config=generation_config, **kwargs)

    def _assisted_decoding(self, *args, generation_config, **kwargs):
        """The library's prompt lookup and assisted generation, candidates verified by captured forwards."""
        with captured_forwards(self, kwargs.get(CACHE), generation_config):
            return super()._assisted_decoding(*args, generation_config=generation_config, **kwargs)

    def free_graphs(self) -> None:
        """Free what `generate()` keeps on a GPU for its next call: caches of up to 1/32 of its memory, and graphs."""
        free_spares(self)
        free_steps(self)

    @staticmethod
    @takes_cache_by_any_name
    def create_masks_for_generate(attention_mask: torch.Tensor | None, cache: Cache, **kwargs):
        """The padding mask as wide as a compileable cache, so that its shape stays fixed from token to token.

        `MLRAModel.forward` makes of it what each form of attention needs.
        """
        if attention_mask is None:
            return None
        missing = cache.get_max_length() - attention_mask.shape[-1]
        return nn.functional.pad(attention_mask, (0, max(missing, 0)))
