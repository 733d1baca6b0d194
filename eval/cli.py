"""Options of the measuring commands. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

COMMANDS = {
    "eval": (".run", "rate and quality of models and peers over a data set"),
    "plot": (".plot", "draw the results of eval, or where a model spends its bits"),
    "fetch": ("..datasets.fetch", "download data sets, or list them"),
}
KINDS = ("image", "video", "grid", "bytes")


def add_parsers(sub: argparse._SubParsersAction) -> None:
    """Register ``eval``, ``plot`` and ``fetch``; each sets ``func``."""
    options = {"eval": eval_arguments, "plot": plot_arguments, "fetch": fetch_arguments}
    for name, (module, text) in COMMANDS.items():
        parser = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        options[name](parser)
        parser.set_defaults(func=_late(module))


def _late(module: str):
    def run(args: argparse.Namespace) -> int:
        return importlib.import_module(module, __package__).main(args)

    return run


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(bars=True)


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec eval``."""
    add = parser.add_argument
    add("folder", nargs="?", metavar="DATASET", help="the same as --dataset")
    add("--dataset", metavar="NAME|DIR", help="kodak, clic2020-professional, tecnick, ..., NAME:SPLIT, or a folder")
    add("--codec", nargs="*", default=[], metavar="MODEL",
        help="ours: hyperprior:light, ..., with a search hyperprior:light+80; for fields grid:exact grid:rmse")
    add("--peers", nargs="*", default=[], metavar="PEER",
        help="pictures: jpeg jpeg-444 webp avif jxl jpeg2000 compressai-mbt2018 ...; video: x264 x264-444 x265 x265-444 "
             "svt-av1; grid: sz3 sz3-2d zfp sperr bitround-zstd jpeg2000 netcdf-deflate; bytes: zlib bz2 lzma zstd brotli "
             "ppmd; or module:Class of your own")  # fmt: skip
    add("--kind", choices=KINDS, help="of the data (default: what the set or folder holds; bytes must be asked for)")
    add("--qualities", nargs="*", type=float, default=[0.0, 12.0, 25.0, 40.0, 55.0, 70.0, 85.0, 100.0], metavar="Q",
        help="qualities 0..100 of our models (default %(default)s)")  # fmt: skip
    add("--metrics", nargs="*", metavar="METRIC",
        help="pictures: psnr psnr_y ms_ssim (the default) ms_ssim_reduced lpips dists feature_distance fid kid; video also "
             "warping_error flicker; grid: snr rmse_weighted rmse_relative max_error max_error_relative "
             "anomaly_correlation spectrum_ratio bias extremes_error gradient_error resolved_wavenumber data_ssim (all by "
             "default)")  # fmt: skip
    add("--squeezenet", type=Path, metavar="FILE",
        help="weights of SqueezeNet 1.1 for feature_distance (default $NEURALCODEC_SQUEEZENET)")  # fmt: skip
    add("--anchor", default="auto",
        help="what BD-rates are against: a published curve of the data set (vtm), a codec of this run, the JSON file of "
             "an earlier one, or auto: vtm where it is published, else the first peer")  # fmt: skip
    add("--out", type=Path, default=Path("eval-results"), metavar="DIR",
        help="folder of the results (default %(default)s); a second run goes on there")  # fmt: skip
    add("-j", "--jobs", type=int, default=1, metavar="N", help="samples at once; 0 means one per core (default 1)")
    add("--threads", type=int, metavar="N", help="threads of each process (default: cores / jobs)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where our models of pictures run (default %(default)s)")
    add("--report", type=Path, metavar="FILE", help="also write a page (HTML, one file) with tables, plots, pictures")
    add("--card", action="store_true", help="write the result into the cards of our models")
    add("--json", action="store_true", help="the summary as JSON on stdout")
    _common(parser)


def plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec plot``."""
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="DIR|FILE",
        help="folders or JSON files that eval wrote; a picture for channels and rate-map")  # fmt: skip
    add("--out", "-o", type=Path, default=Path("plot.svg"), metavar="FILE",
        help="picture to write, by its suffix svg, pdf or png (default %(default)s)")  # fmt: skip
    add("--what", choices=("rd", "rd-ms-ssim", "speed", "channels", "rate-map", "fields"), default="rd",
        help="rd: quality against rate; rd-ms-ssim: MS-SSIM; speed: BD-rate against decode time; channels: bits of each "
             "channel of the latent; rate-map: bits over the picture; fields: two files, the original and the decoded one: "
             "field, error and spectra (default rd)")  # fmt: skip
    add("--codec", metavar="MODEL", help="model for channels and rate-map (default: that of `codec encode`)")
    add("-q", "--quality", type=float, default=50.0, metavar="Q", help="quality for channels and rate-map (default 50)")
    add("--published", nargs="*", metavar="CURVE",
        help="published curves to draw dashed (default: some of the data set's; none with an empty list)")  # fmt: skip
    add("--title", help="title of the plot")
    add("--variable", metavar="NAME", help="variable for fields")
    add("--index", type=int, default=0, metavar="N", help="which level or time of it, counted over all (default 0)")


def fetch_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec fetch``."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="data sets; without any, the known ones are listed")
    add("--root", metavar="DIR", help="folder of all data sets (default $NEURALCODEC_DATA, ~/.cache/neuralcodec/data)")
    add("--verify", action="store_true", help="download nothing, check what is there")
    add("--keep-archives", action="store_true", help="leave archives in place after unpacking them")
    _common(parser)


def curves_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of ``codec bench curves``."""
    add = parser.add_argument
    add("--megapixels", nargs="+", type=float, default=[0.1, 0.3, 1.0, 3.0, 10.0], metavar="N",
        help="sizes of the pictures, 0.001..1000 (default 0.1 0.3 1 3 10)")  # fmt: skip
    add("--thread-counts", nargs="*", type=int, default=[], metavar="N", help="threads (default: 1 and all cores)")
    add("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw them, as svg, pdf or png by the suffix")
