"""Score samples against real images: FID, and KID, Inception score, precision and recall."""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

from collections.abc import Sequence

from common.cli import Parser, silence
from common.errors import command
from evaluation.settings import ScoringSettings


def parse_settings(argv: Sequence[str] | ScoringSettings | None) -> ScoringSettings:
    return Parser(description=__doc__).settings(ScoringSettings, argv, network=False)


@command
def main(argv: Sequence[str] | ScoringSettings | None = None) -> None:
    settings = parse_settings(argv)
    silence(settings.machine.quiet)

    from common.distributed import is_main, joined_processes
    from common.files import writable_folder
    from evaluation.features import load_extractor
    from evaluation.references import open_reference
    from evaluation.samples import Samples
    from evaluation.scoring import score, write_scores
    from evaluation.statistics import save_statistics

    real, batch_size, quiet = settings.real, settings.batch_size, settings.machine.quiet
    with joined_processes(settings.machine.device) as device:
        samples = Samples(settings.samples_path)
        reference = open_reference(real, samples, settings.metrics) if real.dataset or real.reference else None
        for folder in (samples.report, real.cache_dir, settings.save_stats and settings.save_stats.parent):
            if folder is not None:
                writable_folder(folder)
        extractor = load_extractor(settings.feature_extractor, settings.feature_extractor_weights, device)
        if settings.save_stats and (statistics := samples.statistics(extractor, batch_size, quiet)):
            save_statistics(settings.save_stats, statistics)
            print(f"statistics of {len(samples.images)} images -> {settings.save_stats}")
        if reference is not None:
            scores = score(samples, reference, extractor, settings.metrics, batch_size, quiet)
            if is_main():
                print(", ".join(f"{name} {value:.4g}" for name, value in scores.values.items()))
                print(f"-> {write_scores(samples, reference, extractor, scores)}")


if __name__ == "__main__":
    main()
