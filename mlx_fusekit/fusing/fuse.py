"""Fusing: a base model and its adapters into one model folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_fusekit.adapters.sources import AdapterNames, NamedSources
from mlx_fusekit.fusing.options import FuseOptions
from mlx_fusekit.fusing.prepared import PreparedFuse, plan_named
from mlx_fusekit.fusing.report import FuseReport
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS


def prepare_fuse(
    model: str | Path,
    adapter_path: AdapterNames,
    save_path: str | Path,
    *,
    scale: float | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreparedFuse:
    """Check everything that can be refused, and plan the fuse; writes nothing.

    Args: as :func:`fuse`.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure.
    """
    asked = FuseOptions(**options)
    named = NamedSources.find(
        model,
        adapter_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        scale=scale,
        combination=asked.combination,
        ignore=ignore,
    )
    return plan_named(named, Path(save_path).expanduser(), asked, named.open)


def fuse(
    model: str | Path,
    adapter_path: AdapterNames,
    save_path: str | Path,
    *,
    requantize: str = "auto",
    bits: int | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    max_kl: float | None = None,
    max_growth: float | None = None,
    target_bpw: float | None = None,
    memory: int | str | None = None,
    resume: bool = True,
    seed: int = 0,
    scale: float | None = None,
    combine: str = "sum",
    density: float | None = None,
    combine_seed: int = 0,
    ignore: Sequence[str] = (),
    again: bool = False,
    text_only: bool = False,
    export_gguf: bool = False,
    gguf_path: str | Path = "model.gguf",
    outtype: str = "auto",
    upload_repo: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> FuseReport:
    """Fuse adapters into a base model and write the result to a folder that mlx-lm loads.

    Args:
        model: folder or Hub id of the base, quantized by MLX or not.
        adapter_path: folder or Hub id of an mlx-lm adapter, or several; each may be followed by
            ``:WEIGHT`` to scale its update.
        save_path: the folder to make.
        requantize: how merged weights are brought back into the base's format: "calibrated" so
            that the layers' outputs change least on calibration text; "nearest" by rounding, which
            can lose a fine-tune; "auto" calibrated, and with wider bits for the modules that hurt
            most where ``max_kl`` asks for them.
        bits: width to give merged modules instead of the base's.
        dequantize: write the whole model unquantized.
        dtype: "float16", "bfloat16" or "float32" for ``dequantize``; by default as stored scales.
        quantize: quantize the whole model, every module that mlx-lm's converter would; what is
            quantized in another format is quantized anew, from its exact values.
        q_bits: width for ``quantize``; the mode's usual one by default, 4 of "affine".
        q_group_size: weights that share a scale; the mode's by default, 64 of "affine".
        q_mode: "affine" (the default), "mxfp4", "mxfp8" or "nvfp4".
        calibration: text to calibrate on, JSON lines or an array in mlx-lm's formats, a folder with
            ``train.jsonl`` or a text file; by default the adapter's own training data where its
            configuration names an existing folder, else text that base+adapter writes.
        calibration_tokens: about how many tokens to calibrate on.
        max_kl: bound on the mean KL divergence from base+adapter, in nats a token, on text that
            was not calibrated on. For "auto" it is 0.1 by default.
        max_growth: how much larger than the base wider bits may make the model, as a share; by
            default there is no cap where ``max_kl`` is given, and 0.1 otherwise.
        target_bpw: bits a weight that a ``quantize``-d model may take in all: modules get the
            widths with which they gain most, also narrower ones than ``q_bits``.
        memory: what calibrating may take, in bytes or as "8GB"; 0.6 of the machine's by default.
            Where the whole model does not fit, one layer at a time is read from the disk.
        resume: go on with what an interrupted run of the same call has calibrated; else that is
            thrown away.
        seed: of calibration text that is chosen or generated.
        scale: of the adapter's update, taken instead of the one in ``adapter_config.json``.
        combine: how several adapters become one update: "sum" adds them up exactly; "ties", "dare"
            and "dare-ties" combine them element by element, as :mod:`mlx_fusekit.adapters.combined`
            says.
        density: share of each update's elements that ties and dare keep; 0.5 by default.
        combine_seed: of the elements that dare keeps.
        ignore: shell patterns (``*vision_tower*``) of the adapter's modules to leave out.
        again: fuse an adapter also into a model that holds it already.
        text_only: leave out vision, sound and further heads, which mlx-lm does not run; by default
            they come along unchanged.
        export_gguf: write the fused model as a GGUF file too.
        gguf_path: that file, seen from ``save_path``.
        outtype: its types, as :func:`mlx_fusekit.export_gguf` takes them.
        upload_repo: repository on the Hub to upload the result to, which is made private; not where
            ``max_kl`` was given and does not hold, or was not measured.
        revision: of the base on the Hub.
        overwrite: replace an existing model folder.
        trust_remote_code: let model code that lies in the base's folder run, and copy it.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure; the target
            is then as it was before, or, where export or upload failed, the line says that the
            fused model is there.
    """
    prepared = prepare_fuse(
        model,
        adapter_path,
        save_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        requantize=requantize,
        bits=bits,
        dequantize=dequantize,
        dtype=dtype,
        quantize=quantize,
        q_bits=q_bits,
        q_group_size=q_group_size,
        q_mode=q_mode,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        max_kl=max_kl,
        max_growth=max_growth,
        target_bpw=target_bpw,
        memory=memory,
        resume=resume,
        seed=seed,
        scale=scale,
        combine=combine,
        density=density,
        combine_seed=combine_seed,
        ignore=ignore,
        again=again,
        text_only=text_only,
        overwrite=overwrite,
        export_gguf=export_gguf,
        gguf_path=gguf_path,
        outtype=outtype,
        upload_repo=upload_repo,
    )
    return prepared.run(progress=progress)
