"""The stages of a run, each resumable: adapters, task vectors, generator, bundle."""

import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidRecipeError
from service.inference.base_model import BaseModel, load_base_model
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.bundle import Bundle, BundleTask, write_bundle
from service.synthesis.cvae import ConditionalVAE
from service.synthesis.example_tasks import ExampleVectors
from service.synthesis.layout import AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.synthesizer import VECTOR_DTYPE, build_synthesizer
from training.adapters import (
    MeasureLoss,
    cut_windows,
    fine_tune,
    measure_nll,
    read_prefix,
    tokenize_documents,
)
from training.baselines.prompt import prompt_with_description
from training.checkpoint import read_tensors, write_tensors
from training.detection_examples import build_detection_loss
from training.detector import train_detector
from training.example_vectors import encode_examples
from training.functional import train_functionally
from training.generator import build_generator, train_generator
from training.progress import track_job
from training.run_dir import RunDir
from training.task_vectors import AnyTask, TaskVectors, encode_tasks, encoder_spec
from training.tasks.cache import default_cache_dir
from training.tasks.composites import load_base_scenes, read_base_tasks
from training.tasks.detection import load_detection_data
from training.tasks.detection_task import DetectionData
from training.tasks.text import TextTask, load_text_tasks
from training.through_base import ThroughBase


@dataclass
class Pipeline:
    """Stages of one run. Each loads what it needs, does what is missing, and returns."""

    run: RunDir

    @cached_property
    def tasks(self) -> tuple[AnyTask, ...]:
        """The recipe's tasks."""
        if self.detection is not None:
            return self.detection.tasks
        section = self.run.recipe.tasks
        return load_text_tasks(section.source, section.names)

    @cached_property
    def detection(self) -> DetectionData | None:
        """Scenes of the recipe's tasks, where these are detection tasks."""
        section = self.run.recipe.tasks
        if self.run.recipe.detection is None:
            return None
        return load_detection_data(section.source, section.names)

    @cached_property
    def base(self) -> BaseModel:
        """The frozen base, not wrapped."""
        section = self.run.recipe.base
        return load_base_model(
            section.reference,
            dtype=section.dtype,
            cache_dir=default_cache_dir(),
            bundle_folder=self.run.root,
        )

    def train_base(self) -> None:
        """Trains the embedded detector, where the recipe has one."""
        recipe = self.run.recipe
        section = recipe.detector
        if section is None or (self.run.base / "model.safetensors").exists():
            return
        with self.run.claim("detector") as mine:
            if not mine:
                raise InvalidRecipeError("another process is training the base of this run")
            scenes = load_base_scenes(section.num_scenes)
            tasks, wordings = read_base_tasks()
            with track_job(self.run, "detector", section.num_steps, every=50) as report:
                train_detector(
                    self.run.base,
                    scenes,
                    tasks,
                    wordings,
                    section,
                    seed=recipe.seed,
                    state_path=self.run.state("detector"),
                    report=report,
                )

    @cached_property
    def bases(self) -> AdapterBases:
        """Frozen bases of the adapters, made once per run (before the base is wrapped)."""
        section = self.run.recipe.adapter
        layout = AdapterLayout.from_model(self.base.model, **section.model_dump())
        if not self.run.bases.exists():
            made = AdapterBases.from_model(layout, self.base.model, self.run.recipe.seed)
            write_tensors(self.run.bases, made.state_dict(), {"layout": layout.digest})
        state, _ = read_tensors(self.run.bases)
        return AdapterBases.from_state_dict(layout, state)

    def fine_tune_adapters(self) -> None:
        """Fine-tunes one adapter per task and seed; several processes may share the work."""
        section = self.run.recipe.finetune
        pending = [
            (task, seed)
            for seed in section.seeds
            for task in self.tasks
            if not self.run.adapter(task.name, seed).exists()
        ]
        if not pending:
            return
        attachment = Attachment(self.base.model, self.bases)
        for task, seed in pending:
            with self.run.claim(f"{task.name}.{seed}") as mine:
                if mine and not self.run.adapter(task.name, seed).exists():
                    self._fine_tune_one(attachment, task, seed)
        attachment.detach(self.base.model)

    def _fine_tune_one(self, attachment: Attachment, task: AnyTask, seed: int) -> None:
        section = self.run.recipe.finetune
        measure_loss = self._build_loss(task, seed)
        state = self.run.state(f"{task.name}.{seed}")
        with track_job(self.run, f"adapter {task.name}", section.num_steps) as report:
            checkpoints = fine_tune(
                self.base,
                attachment,
                measure_loss,
                section,
                seed=self.run.recipe.seed + seed,
                state_path=state,
                report=lambda step, loss: report(step, loss=loss),
            )
        metadata = {"task": task.name, "seed": str(seed), "layout": self.bases.layout.digest}
        tensors = {"checkpoints": checkpoints.to(VECTOR_DTYPE)}  # as they would be served
        write_tensors(self.run.adapter(task.name, seed), tensors, metadata)
        state.unlink(missing_ok=True)

    def _build_loss(
        self,
        task: AnyTask,
        seed: int,
        *,
        behind_description: bool = False,
        unseen: Collection[str] = (),
    ) -> MeasureLoss:
        """Training loss of a task's examples, text or detection.

        Behind a description: each batch of text behind one wording, that of its first example;
        every scene asked for in a wording of the task's own. Tasks of text share no data; of
        scenes those with objects of unseen tasks are left out.
        """
        recipe = self.run.recipe
        if isinstance(task, TextTask):
            section = recipe.finetune
            tokens = tokenize_documents(self.base, task.train)
            windows = cut_windows(tokens, section.num_windows, section.window_tokens, seed)
            if not behind_description:
                return lambda numbers: measure_nll(self.base, windows[numbers]).mean()
            prompts = [prompt_with_description(self.base, each) for each in task.descriptions]

            def measure_behind(numbers: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
                prefix = read_prefix(self.base, prompts[int(numbers[0]) % len(prompts)])
                prefix.batch_repeat_interleave(len(numbers))
                return measure_nll(self.base, windows[numbers], prefix).mean()

            return measure_behind
        assert self.detection is not None
        assert recipe.detection is not None
        asked = {"own_prompt_share": 1.0} if behind_description else {}
        return build_detection_loss(
            self.base,
            task,
            self.detection,
            recipe.detection.model_copy(update=asked),
            num_examples=recipe.finetune.num_windows,
            seed=seed,
            unseen=unseen,
        )

    def read_checkpoints(self) -> dict[str, Float[Tensor, "checkpoints num_params"]]:
        """Late checkpoints by task, all fine-tuning seeds together.

        Raises:
            InvalidRecipeError: an adapter is missing; the stage before is not finished.
        """
        checkpoints: dict[str, Tensor] = {}
        for task in self.tasks:
            parts = []
            for seed in self.run.recipe.finetune.seeds:
                path = self.run.adapter(task.name, seed)
                if not path.exists():
                    raise InvalidRecipeError(
                        f"adapter of {task.name!r} is missing: run `icm-lora adapters` first"
                    )
                parts.append(read_tensors(path)[0]["checkpoints"].float())
            checkpoints[task.name] = torch.cat(parts)
        return checkpoints

    def encode_task_vectors(self) -> TaskVectors:
        """Encodes every training wording of every task once."""
        spec = encoder_spec(self.run.recipe.encoder, self.run.recipe.base)
        if self.run.task_vectors.exists():
            return TaskVectors.read(self.run.task_vectors, spec, self.tasks)
        vectors = encode_tasks(self.run.recipe.encoder, self.tasks, lambda: self.base)
        vectors.write(self.run.task_vectors, spec, self.tasks)
        return vectors

    def train_generator(self) -> None:
        """Fits the normaliser and trains the conditional VAE over all tasks, for each seed.

        Several processes may share the seeds.
        """
        seeds = self.run.recipe.generator_seeds
        missing = [seed for seed in seeds if not self._generator_path(seed).exists()]
        if not missing:
            return
        vectors = self.encode_task_vectors()
        checkpoints = self.read_checkpoints()
        for seed in missing:
            path = self._generator_path(seed)
            with self.run.claim(path.stem) as mine:
                if not mine or path.exists():
                    continue
                if not self.run.seeded_generator(seed).exists():
                    layout = self.bases.layout
                    train_generator(self.run, layout, checkpoints, vectors, seed, self.families)
                if self.run.recipe.functional is not None:
                    self._train_functionally(vectors, checkpoints, seed)

    def _train_functionally(
        self, vectors: TaskVectors, checkpoints: Mapping[str, Tensor], seed: int
    ) -> None:
        section = self.run.recipe.functional
        assert section is not None
        with self.open_through_base(section.batch_size, seed) as through_base:
            train_functionally(
                self.run,
                self._load_generator(self.run.seeded_generator(seed), seed, vectors),
                AdapterNormalizer.fit(self.bases.layout, checkpoints),
                vectors,
                [task.name for task in self.tasks],
                self.families,
                through_base,
                seed,
            )

    @contextmanager
    def open_through_base(self, batch_size: int, seed: int) -> Iterator[ThroughBase]:
        """Losses of adapters on all tasks' training examples; the base is wrapped meanwhile.

        The recipe's section `[functional]` says whether descriptions stand before the examples.

        Args:
            batch_size: examples of a drawn batch.
            seed: of the choice of each task's examples.
        """
        section = self.run.recipe.functional
        behind = section is not None and section.behind_description
        tasks = {task.name: task for task in self.tasks}
        attachment = Attachment(self.base.model, self.bases)

        @lru_cache(maxsize=len(tasks))
        def get_loss(name: str, unseen: frozenset[str]) -> MeasureLoss:
            return self._build_loss(tasks[name], seed, behind_description=behind, unseen=unseen)

        try:
            yield ThroughBase(
                self.base,
                attachment,
                get_loss,
                self.run.recipe.finetune.num_windows,
                batch_size,
            )
        finally:
            attachment.detach(self.base.model)

    @property
    def families(self) -> list[str]:
        """Of each task; a task without one is its own."""
        return [getattr(task, "family", "") or task.name for task in self.tasks]

    def _generator_path(self, seed: int) -> Path:
        """Where the finished generator of a seed lies."""
        if self.run.recipe.functional is not None:
            return self.run.functional_generator(seed)
        return self.run.seeded_generator(seed)

    def make_bundle(self) -> Bundle:
        """Writes the bundle from the finished stages, and beside it the own adapters.

        The own adapters (mean of each task's late checkpoints) are what evaluation compares
        with; the bundle must not hold them.
        """
        recipe = self.run.recipe
        vectors = self.encode_task_vectors()
        layout = self.bases.layout
        model = self._read_generator(recipe.seed, vectors)
        checkpoints = self.read_checkpoints()
        own = {name: kept.mean(0).to(VECTOR_DTYPE) for name, kept in checkpoints.items()}
        write_tensors(self.run.own_adapters, own, {"layout": layout.digest})
        if recipe.detector is not None:
            copytree(self.run.base, self.run.bundle / "base", dirs_exist_ok=True)
        bundle = write_bundle(
            self.run.bundle,
            name=recipe.bundle.name,
            version=recipe.bundle.version,
            modality=self.base.modality,
            base_reference=recipe.base.reference,
            base_digest=self.base.digest,
            encoder_id=vectors.encoder_id,
            encoder_spec=self._bundle_encoder(),
            bases=self.bases,
            normalizer=AdapterNormalizer.fit(layout, checkpoints),
            generator=model.config,
            decoder=model.decoder,
            tasks=tuple(BundleTask(t.name, t.title, t.descriptions) for t in self.tasks),
            task_vectors=vectors.rows,
            owner=vectors.owner,
            similarity_quantiles=vectors.leave_one_out_similarities(),
            provenance={
                "recipe": recipe.to_json(),
                "recipe_digest": recipe.digest,
                "commit": describe_commit(),
            },
            examples=self._encode_examples(),
        )
        self._write_seed_adapters(bundle, vectors)
        return bundle

    def _encode_examples(self) -> ExampleVectors | None:
        """The tasks by example, where the recipe asks for them."""
        section = self.run.recipe.examples
        if section is None:
            return None
        texts = [task for task in self.tasks if isinstance(task, TextTask)]
        return encode_examples(self.base, texts, section.num_samples)

    def _read_generator(self, seed: int, vectors: TaskVectors) -> ConditionalVAE:
        path = self._generator_path(seed)
        if not path.exists():
            raise InvalidRecipeError(f"{path.name} is missing: run `icm-lora generator` first")
        return self._load_generator(path, seed, vectors)

    def _load_generator(self, path: Path, seed: int, vectors: TaskVectors) -> ConditionalVAE:
        model = build_generator(self.bases.layout, self.run.recipe, vectors, seed)
        model.load_state_dict(read_tensors(path)[0])
        return model.eval()

    def _write_seed_adapters(self, bundle: Bundle, vectors: TaskVectors) -> None:
        """Adapters of the generators that are not shipped, rounded as in a bundle."""
        adapters: dict[str, Tensor] = {}
        for seed in self.run.recipe.generator_seeds[1:]:
            decoder = self._read_generator(seed, vectors).decoder.half().float()
            synthesizer = build_synthesizer(replace(bundle, decoder=decoder))
            for task in self.tasks:
                made = synthesizer.synthesize_words(task.heldout_descriptions[0])
                adapters[f"{task.name}.{seed}"] = made.vector
        if adapters:
            write_tensors(self.run.seed_adapters, adapters, {"layout": bundle.layout.digest})

    def _bundle_encoder(self) -> dict[str, Any]:
        """Specification of the encoder of words, and of the one of images if there is one."""
        recipe = self.run.recipe
        spec = encoder_spec(recipe.encoder, recipe.base)
        images = recipe.detection.images if recipe.detection is not None else ""
        return spec | ({"images": images} if images else {})

    def run_all(self) -> Bundle:
        """All stages in order."""
        self.train_base()
        self.fine_tune_adapters()
        self.encode_task_vectors()
        self.train_generator()
        return self.make_bundle()


def describe_commit() -> str:
    """Commit of the code that runs, `unknown` outside a checkout, `+` where it is modified."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
