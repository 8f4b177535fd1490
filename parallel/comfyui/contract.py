"""Contract with ComfyUI: all of its symbols that this pack relies on, as data, and the check of a ComfyUI against them.

Imports nothing of ComfyUI: at start it inspects the modules that ComfyUI has loaded itself, and
`python -m parallel contract` reads source files.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..errors import UnsupportedError
from ..versions import NEWEST_COMFYUI, OLDEST_COMFYUI
from .contract_loaded import Loaded
from .contract_readers import Found, Missing, dotted, signature_of

log = logging.getLogger("sequence_parallel")


class View(Protocol):
    """View of a ComfyUI: its source files, or its loaded modules."""

    def find(self, module: str, names: Sequence[str]) -> Found | None:
        """Returns a symbol; None where this view does not know the symbol's module.

        Raises:
            Missing: the symbol does not exist.
        """


class Part(NamedTuple):
    """Symbols that one use needs.

    Each line is a module of ComfyUI's, or below it one of

    - `A.b`: it exists; attributes that A's methods set count, too.
    - `A.b(_, name=_)`: it can be called with these arguments.
    - `A.b <- x, y=0, **rest`: the pack's replacement or wrapper of A.b is called with A.b's own arguments, and takes
      these: names and order must be the same, and A.b has no others, unless `**rest` takes them. 0: not always passed.
    - `A.b["x", "y"]`: its code uses these names or texts.

    A question mark before a line: older versions lack the symbol, and work without it.
    """

    affects: str
    """Features that break, in words for the user."""
    symbols: str


PARTS = {
    "nodes": Part(
        "every node",
        """
        comfyui_version
            __version__
        comfy_api.latest
            ComfyExtension.get_node_list <-
            ComfyExtension.on_load <-
            io.ComfyNode.define_schema <-
            io.ComfyNode.execute <- **inputs
            io.ComfyNode.validate_inputs <- **inputs
            io.ComfyNode.fingerprint_inputs <- **inputs
            io.ComfyNode.hidden
            io.Hidden.unique_id
            io.Input
            io.NodeOutput(_)
            io.Custom(_)
            io.Schema(node_id=_, display_name=_, category=_, description=_, inputs=_, outputs=_, hidden=_)
            io.Boolean.Input(_, default=_, tooltip=_)
            io.Combo.Input(_, options=_, default=_, optional=_, tooltip=_, advanced=_)
            io.Float.Input(_, default=_, min=_, max=_, step=_, round=_, tooltip=_, advanced=_)
            io.Int.Input(_, default=_, min=_, max=_, step=_, control_after_generate=_, tooltip=_)
            io.String.Input(_, default=_, tooltip=_)
            io.Clip.Output(tooltip=_)
            io.Conditioning.Input(_, tooltip=_)
            io.Image.Input(_, tooltip=_)
            io.Image.Output()
            io.Latent.Input(_, tooltip=_)
            io.Latent.Output()
            io.Model.Input(_, tooltip=_)
            io.Model.Output(tooltip=_)
            io.Vae.Input(_, tooltip=_)
            io.Vae.Output(tooltip=_)
        comfy.cli_args
            args.multi_user
        folder_paths
            get_user_directory()
        """,
    ),
    "model": Part(
        "Load Diffusion Model (SP), Load Checkpoint (SP) and every node on their MODEL",
        """
        folder_paths
            get_filename_list(_)
            get_folder_paths(_)
            get_full_path_or_raise(_, _)
            recursive_search(_, excluded_dir_names=_)
        comfy.sd
            load_checkpoint_guess_config(_, output_model=_, embedding_directory=_)
            VAE(sd=_)
        comfy.model_detection
            unet_prefix_from_state_dict(_)
            model_config_from_unet(_, _, metadata=_)
            convert_diffusers_mmdit(_, _)
        comfy.supported_models_base
            BASE.get_model(_, _, device=_)
            BASE.set_inference_dtype(_, _)
            BASE.process_unet_state_dict(_)
            BASE.unet_config
            BASE.supported_inference_dtypes
            BASE.quant_config
            BASE.manual_cast_dtype
        comfy.utils
            load_torch_file(_, return_metadata=_)
            convert_old_quants(_, _, metadata=_)
            state_dict_prefix_replace(_, _, filter_keys=_)
            calculate_parameters(_)
            weight_dtype(_)
            unpack_latents(_, _)
            ProgressBar(_)
            ProgressBar.update_absolute(_, _)
        comfy.model_management
            unet_dtype(model_params=_, supported_dtypes=_, weight_dtype=_)
            unet_manual_cast(_, _, _)
            unet_offload_device()
            get_torch_device()
            throw_exception_if_processing_interrupted()
            OOM_EXCEPTION
            archive_model_dtypes["_comfy_model_dtype"]
        comfy.model_base
            BaseModel.diffusion_model
            BaseModel.latent_format
            BaseModel.memory_usage_factor
            BaseModel._apply_model["diffusion_model", "context", "control", "transformer_options"]
            LTXAV.extra_conds["preprocess_text_embeds"]
            Anima.extra_conds["preprocess_text_embeds"]
            ? MiniMaxH3.extra_conds["preprocess_text_embeds", "minimax_payload"]
        comfy.latent_formats
            LatentFormat.latent_channels
        comfy.model_patcher
            ModelPatcher <- model, load_device, offload_device, size=0, **options
            ModelPatcher.model_size <-
            ModelPatcher.get_free_memory <- device
            ModelPatcher.partially_load <- device_to, extra_memory=0, force_patch_weights=0
            ModelPatcher.partially_unload <- device_to, memory_to_free=0, force_patch_weights=0
            ModelPatcher.unpatch_model <- device_to=0, unpatch_weights=0
            ModelPatcher.load <- *args, **kwargs
            ModelPatcher.cleanup <-
            ModelPatcher.lowvram_patch_counter <-
            ModelPatcher.clone()
            ModelPatcher.detach()
            ModelPatcher.loaded_size()
            ModelPatcher.use_ejected(skip_and_inject_on_exit_only=_)
            ModelPatcher.patch_model(load_weights=_)
            ModelPatcher.add_wrapper_with_key(_, _, _)
            ModelPatcher.add_callback_with_key <- call_type, key, callback
            ModelPatcher.model_options
            ModelPatcher.object_patches
            ModelPatcher.patches
            ModelPatcher.patches_uuid
            ModelPatcher.__init__["model_loaded_weight_memory", "current_weight_patches_uuid"]
        comfy.patcher_extension
            get_all_wrappers(_, _, is_model_options=_)
            WrapperExecutor.new_class_executor(_, _, _)
            WrapperExecutor.execute <- *args, **kwargs
            WrapperExecutor.class_obj
            WrappersMP.APPLY_MODEL
            WrappersMP.CALC_COND_BATCH
            WrappersMP.DIFFUSION_MODEL
            WrappersMP.OUTER_SAMPLE
        comfy.samplers
            _calc_cond_batch <- model, conds, x_in, timestep, model_options
            _calc_cond_batch["cond_or_uncond", "uuids", "sigmas"]
            CFGGuider.outer_sample <- noise, latent_image, sampler, sigmas, denoise_mask=0, callback=0, **kwargs
            CFGGuider.model_patcher
            CFGGuider.model_options
        comfy.ldm.modules.attention
            optimized_attention
            REGISTERED_ATTENTION_FUNCTIONS
            get_attention_function(_, _)
            attention_basic <- q, k, v, heads, mask=0, attn_precision=0, skip_reshape=0, skip_output_reshape=0, **named
            wrap_attn["transformer_options", "optimized_attention_override"]
        comfy.ops
            mixed_precision_ops["comfy_quant"]
        """,
    ),
    "loras": Part(
        "LoRAs on the MODEL of a loader (SP)",
        """
        comfy.model_patcher
            ModelPatcher(_, _, _, size=_)
            ModelPatcher.patch_weight_to_device(_, device_to=_)
            ModelPatcher.add_patches <- patches, strength_patch=0, strength_model=0
        comfy.utils
            get_attr(_, _)
        """,
    ),
    "gguf": Part(
        "GGUF files in Load Diffusion Model (SP)",
        """
        nodes
            NODE_CLASS_MAPPINGS
        comfy.supported_models_base
            BASE.custom_operations
        comfy.utils
            swap_scale_shift
        comfy.weight_adapter
            adapters
            WeightAdapterBase
            LoRAAdapter.name
            LoRAAdapter.weights
        """,
    ),
    "refusals": Part(
        "errors that name nodes which cannot run in the workers: such a node may have no effect instead",
        """
        comfy.model_patcher
            ModelPatcher.set_injections <- key, injections
            ModelPatcher.add_hook_patches <- *args, **kwargs
            ModelPatcher.register_all_hook_patches <- hooks, target_dict, model_options=0, registered=0
            ModelPatcher.add_weight_wrapper <- name, function
            ModelPatcher.get_key_patches <- filter_prefix=0
            ? ModelPatcher.model_state_dict_for_saving <- *args, **kwargs
            ModelPatcher.state_dict_for_saving <- *args, **kwargs
            ? ModelPatcher.deepclone_multigpu <- *args, **kwargs
            ModelPatcher.set_model_patch["patches"]
            ModelPatcher.set_model_compute_dtype["manual_cast_dtype"]
            set_model_options_patch_replace["patches_replace"]
        comfy.sd
            load_bypass_lora_for_models["bypass_lora"]
        comfy.hooks
            EnumHookType.Weight
            HookGroup.get_type(_)
        """,
    ),
    "caches": Part(
        "First Block Cache (SP), TeaCache (SP) and Torch Compile (SP)",
        """
        comfy.model_patcher
            create_model_options_clone(_)
            ModelPatcher.get_model_object(_)
        comfy.model_sampling
            ModelSamplingDiscrete.percent_to_sigma(_)
            ModelSamplingDiscreteFlow.percent_to_sigma(_)
        comfy.context_windows
            IndexListContextWindow.index_list
            IndexListContextHandler.evaluate_context_windows["context_window"]
        comfy_extras.nodes_easycache
            easycache_forward_wrapper["easycache"]
            EasyCacheHolder.name
            LazyCacheHolder.name
        """,
    ),
    "fp8": Part(
        "FP8 Quantize (SP)",
        """
        comfy.model_patcher
            ModelPatcher.attachments
            ModelPatcher.set_attachments(_, _)
        """,
    ),
    "kitchen": Part(
        "schemes of comfy-kitchen in FP8 Quantize (SP)",
        """
        comfy.ops
            pick_operations(_, _, load_device=_, model_config=_)
            pick_operations["quant_config", "disabled"]
            mixed_precision_ops["quant_format", "layout_type", "_full_precision_mm", "_disabled"]
        comfy.quant_ops
            QUANT_ALGOS["comfy_tensor_layout"]
            QuantizedTensor
        """,
    ),
    "sampler": Part(
        "Sampler (SP)",
        """
        nodes
            common_ksampler(_, _, _, _, _, _, _, _, _, denoise=_)
        comfy.samplers
            KSampler.SAMPLERS
            KSampler.SCHEDULERS
            KSAMPLER.sample <- model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            CFGGuider.inner_model
            CFGGuider.conds
            calc_cond_batch["context_handler"]
            _calc_cond_batch["model_function_wrapper"]
            ? _calc_cond_batch_multigpu["multigpu_clones"]
            cfg_function["sampler_cfg_function", "sampler_post_cfg_function"]
            sampling_function["sampler_calc_cond_batch_function", "sampler_pre_cfg_function"]
            KSamplerX0Inpaint.__call__["denoise_mask_function"]
            get_area_and_mult["area", "control", "gligen", "hooks"]
        comfy.model_management
            InterruptProcessingException
        comfy.patcher_extension
            WrappersMP.PREDICT_NOISE
            WrappersMP.SAMPLER_SAMPLE
        """,
    ),
    "vae": Part(
        "VAE (Parallel), VAE Decode (Parallel) and VAE Encode (Parallel)",
        """
        nodes
            NODE_CLASS_MAPPINGS
            VAEDecodeTiled.decode(vae=_, samples=_, tile_size=_, overlap=_, temporal_size=_, temporal_overlap=_)
            VAEEncodeTiled.encode(vae=_, pixels=_, tile_size=_, overlap=_, temporal_size=_, temporal_overlap=_)
            VAEDecodeTiled.FUNCTION
            VAEEncodeTiled.FUNCTION
        comfy.sd
            VAE(sd=_, device=_, dtype=_, metadata=_)
            VAE.decode_tiled <- samples, *args, **settings
            VAE.encode_tiled <- pixel_samples, *args, **settings
            VAE.decode <- samples_in, *args, **options
            VAE.encode <- pixel_samples
            VAE.device
            VAE.downscale_ratio
            VAE.extra_1d_channel
            VAE.first_stage_model
            ? VAE.handles_tiling
            VAE.latent_channels
            VAE.latent_dim
            VAE.memory_used_decode
            VAE.memory_used_encode
            VAE.not_video
            VAE.output_channels
            VAE.output_device
            VAE.patcher
            VAE.process_input
            VAE.upscale_ratio
            VAE.vae_dtype
        comfy.utils
            PROGRESS_BAR_HOOK
            set_progress_bar_global_hook(_)
        comfy.model_management
            module_size(_)
        """,
    ),
    "panel": Part(
        "the panel and the workers' log files",
        """
        folder_paths
            get_system_user_directory(_)
        server
            PromptServer.instance
            PromptServer.routes
            PromptServer.sockets
            PromptServer.prompt_queue
            PromptServer.send_json(_, _, _)
        execution
            PromptQueue.set_flag(_, _)
        """,
    ),
    "texts": Part(
        "texts on nodes, and notices in the browser",
        """
        comfy_execution.utils
            get_executing_context()
            ExecutionContext.node_id
        server
            PromptServer.client_id
            PromptServer.send_sync(_, _, _)
            PromptServer.send_progress_text(_, _)
        """,
    ),
    "previews": Part(
        "leaving out latents that no preview needs, in Sampler (SP)",
        """
        latent_preview
            prepare_callback["callback", "pbar", "previewer", "x0_output_dict"]
        """,
    ),
    "plans": Part(
        "`python -m parallel plan`",
        """
        comfy.ops
            disable_weight_init
        """,
    ),
}


@dataclass(frozen=True)
class Symbol:
    """Parsed line of a `Part`."""

    module: str
    names: tuple[str, ...]
    call: ast.Call | None = None
    takes: inspect.Signature | None = None
    words: tuple[str, ...] = ()
    may_lack: bool = False

    @property
    def title(self) -> str:
        return ".".join([self.module, *self.names])

    def difference(self, found: Found) -> str:
        """Returns how the found symbol differs; empty if it fits, or if this cannot be determined."""
        if self.call is not None and found.signature is not None:
            try:
                found.signature.bind(*self.call.args, **{str(word.arg): ... for word in self.call.keywords})
            except TypeError as error:
                return f"{self.title}: {error}"
        if self.takes is not None and found.signature is not None and (what := _unlike(found.signature, self.takes)):
            return f"{self.title}: {what}"
        lacking = [word for word in self.words if found.words is not None and word not in found.words]
        return f"{self.title}: no {', '.join(lacking)} in it" if lacking else ""


def _unlike(theirs: inspect.Signature, ours: inspect.Signature) -> str:
    """Returns why a function with the parameters `ours` cannot be called as one with `theirs`; empty if it can."""
    kinds = {each.kind for each in ours.parameters.values()}
    named = [each for each in ours.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    given = [
        each for each in theirs.parameters.values() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    for mine, other in zip(named, given, strict=False):
        if mine.name != other.name:
            return f"{other.name!r} where {mine.name!r} was"
    if lacking := [each.name for each in named[len(given) :] if each.default is each.empty]:
        return f"no {', '.join(lacking)}"
    new = [each for each in given[len(named) :] if inspect.Parameter.VAR_KEYWORD not in kinds]
    return f"a new parameter {new[0].name!r}" if new else ""


def symbols(part: Part) -> Iterator[Symbol]:
    """Parses the lines of a part."""
    module = ""
    for line in textwrap.dedent(part.symbols).strip().splitlines():
        if not line[0].isspace():
            module = line
            continue
        text, takes, parameters = line.strip().removeprefix("? ").partition(" <-")
        expression, words, signature = ast.parse(text, mode="eval").body, "", None
        if takes:
            stub = ast.parse(f"lambda {parameters}: 0", mode="eval").body
            assert isinstance(stub, ast.Lambda)
            signature = signature_of(stub.args)
        call = expression if isinstance(expression, ast.Call) else None
        if isinstance(expression, ast.Subscript):
            words = ast.literal_eval(expression.slice)
        named = expression.func if isinstance(expression, ast.Call) else expression
        named = named.value if isinstance(named, ast.Subscript) else named
        found = (words,) if isinstance(words, str) else words
        yield Symbol(module, tuple(dotted(named)), call, signature, tuple(filter(None, found)), "? " in line)


def differences(view: View) -> dict[str, list[str]]:
    """Returns the differences of a ComfyUI from the contract → the parts that each affects."""
    found: dict[str, list[str]] = {}
    for name, part in PARTS.items():
        for symbol in symbols(part):
            try:
                there = view.find(symbol.module, symbol.names)
                what = "" if there is None else symbol.difference(there)
            except Missing as missing:
                what = "" if symbol.may_lack else f"{missing} is missing"
            if what and name not in found.setdefault(what, []):
                found[what].append(name)
    return found


def describe(found: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a line for each difference: the difference, and the features that it affects."""
    return [f"{what} (affects {'; '.join(PARTS[name].affects for name in parts)})" for what, parts in found.items()]


# --- the ComfyUI that runs --------------------------------------------------------------------------------------------


@functools.cache
def changed() -> dict[str, list[str]]:
    """Returns the differences of the ComfyUI that this process has imported; logged at the first call."""
    found = differences(Loaded())
    if found:
        log.warning("%s", _message(found))
    return found


def require(*parts: str) -> None:
    """Refuses a ComfyUI that does not fit these parts; without arguments, one that differs in anything.

    Raises:
        UnsupportedError: naming the differences, and the versions that are known to work.
    """
    if found := {what: of for what, of in changed().items() if not parts or set(parts) & set(of)}:
        raise UnsupportedError(_message(found))


def fits(part: str) -> bool:
    """Returns True if a part can be used; for features without which everything else works."""
    return not any(part in parts for parts in changed().values())


def _message(found: Mapping[str, Sequence[str]]) -> str:
    version = getattr(sys.modules.get("comfyui_version"), "__version__", "")
    lines = "".join(f"\n- {line}" for line in describe(found))
    return (
        f"This ComfyUI {version} is not as Sequence Parallel expects it. Known to work are {OLDEST_COMFYUI} to"
        f" {NEWEST_COMFYUI}: use one of these, or update Sequence Parallel. What is different:{lines}"
    )
