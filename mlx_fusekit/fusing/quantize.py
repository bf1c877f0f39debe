"""Quantizing a model that is whole already: merged, or fine-tuned in all its weights."""

from pathlib import Path
from typing import Any

from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.fusing.options import FuseOptions
from mlx_fusekit.fusing.prepared import PreparedFuse, plan_named
from mlx_fusekit.fusing.report import FuseReport
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS


def prepare_quantize(
    model: str | Path,
    save_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreparedFuse:
    """Check everything that can be refused, and plan the work; writes nothing.

    Args: as :func:`quantize`.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure.
    """
    asked = FuseOptions(quantize=True, **options)
    named = NamedSources.alone(model, revision=revision, trust_remote_code=trust_remote_code)
    return plan_named(named, Path(save_path).expanduser(), asked, named.open)


def quantize(
    model: str | Path,
    save_path: str | Path,
    *,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    requantize: str = "auto",
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    max_kl: float | None = None,
    max_growth: float | None = None,
    target_bpw: float | None = None,
    memory: int | str | None = None,
    resume: bool = True,
    seed: int = 0,
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
    """Quantize a model as a whole, so that it stays close to what it is.

    What mlx-lm's converter would quantize is quantized. Arguments are those of
    :func:`mlx_fusekit.fuse`; where no calibration text is given, the model writes it.

    Args:
        model: folder or Hub id of the model, as mlx-lm or Hugging Face have it. One that is
            quantized in another format is quantized anew, from its exact values.
        save_path: the folder to make.
        q_bits: width; the mode's usual one by default, 4 of "affine".
        q_group_size: weights that share a scale; the mode's by default, 64 of "affine".
        q_mode: "affine" (the default), "mxfp4", "mxfp8" or "nvfp4".
        requantize: "calibrated", "nearest", or "auto".
        calibration: text to calibrate on.
        calibration_tokens: about how many tokens of it.
        max_kl: bound on the mean KL divergence from the model, in nats a token, on text that was
            not calibrated on.
        max_growth: how much larger than asked for wider bits may make the result, as a share.
        target_bpw: bits a weight that the result may take in all: modules get the widths with which
            they gain most, also narrower ones than ``q_bits``.
        memory: what calibrating may take, in bytes or as "8GB".
        resume: go on with what an interrupted run of the same call has done.
        seed: of calibration text that is chosen or generated.
        text_only: leave out what mlx-lm does not run.
        export_gguf: write the result as a GGUF file too.
        gguf_path: that file, seen from ``save_path``.
        outtype: its types, as :func:`mlx_fusekit.export_gguf` takes them.
        upload_repo: repository on the Hub to upload the result to, which is made private.
        revision: of the model on the Hub.
        overwrite: replace an existing model folder.
        trust_remote_code: let model code that lies in the folder run, and copy it.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: as :func:`mlx_fusekit.fuse`.
    """
    prepared = prepare_quantize(
        model,
        save_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        q_bits=q_bits,
        q_group_size=q_group_size,
        q_mode=q_mode,
        requantize=requantize,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        max_kl=max_kl,
        max_growth=max_growth,
        target_bpw=target_bpw,
        memory=memory,
        resume=resume,
        seed=seed,
        text_only=text_only,
        export_gguf=export_gguf,
        gguf_path=gguf_path,
        outtype=outtype,
        upload_repo=upload_repo,
        overwrite=overwrite,
    )
    return prepared.run(progress=progress)
