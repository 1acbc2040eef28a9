"""Going on with a run that was stopped, or repeating one: that one, and no other."""

from harness import checkpoint, identity, output_folder
from harness.arguments import OVERRIDABLE
from harness.run import Position, Progress, say
from inputs import formats
from inputs.errors import InputError


def check_repeat(setup):
    """Refuse to repeat what this run cannot: the run of --from_results, as a whole or in part.

    Returns the hashes that the model must have.
    """
    source, allowed = setup.args.from_results, setup.args.allow_other
    _, recorded = formats.read(source, formats.Results)
    identity.refuse_another_run(setup, identity.recorded_identity(recorded), source)
    mixed = [name for name in OVERRIDABLE if name in recorded.overruled and name not in allowed]
    if mixed:
        raise InputError(f"{source} is of a run that was resumed with other {' and '.join(mixed)} "
                         f"than it began with: no run repeats it exactly; --allow_other "
                         f"{' '.join(mixed)} repeats its flags")
    return {name: getattr(recorded, name) for name in identity.MODEL_HASHES}


def finished(setup):
    """The content of the results.json of a run that is finished already, or None."""
    file = setup.args.output_dir / "results.json"
    if not file.exists():
        return None
    content, results = formats.read(file, formats.Results)
    identity.refuse_another_run(setup, identity.recorded_identity(results), file)
    refuse_another_model(setup, content, file)
    return content


def refuse_another_model(setup, hashes, source):
    """Raise InputError where `source` is of another model than the run of --from_results."""
    identity.refuse_another_model(setup.known_hashes, hashes,
                                  f"{setup.args.from_results} is of a run, unlike {source},")


def find(setup, fresh):
    """Find where to go on -> (Progress, the Checkpoint or None: then the `fresh` Progress)."""
    folder = setup.args.output_dir
    found = checkpoint.newest(setup)
    if found is None:
        say(setup.accelerator, f"no whole checkpoint in {folder}: starting from the beginning")
        return fresh, None
    state = found.state
    source = f"checkpoint {folder / checkpoint.FOLDER / found.name}"
    overruled = identity.refuse_another_run(setup, state["identity"], source)
    checkpoint.check_state(setup, state)
    refuse_another_model(setup, state["hashes"], source)
    progress = Progress(Position(*state["position"]), state["rows"], state["files"],
                        state["hashes"], overruled | set(state["overruled"]),
                        fresh.seconds.after(state["seconds"]))
    return progress, found


def prepare_output_folder(run, resumed):
    """Clear the run's folder, or bring it back to the checkpoint that it is resumed from."""
    folder = run.args.output_dir
    if run.accelerator.is_main_process:
        if resumed is None:
            output_folder.clear(folder)
            checkpoint.drop_leftovers(folder)
        else:
            checkpoint.restore_files(folder, resumed)
            keep = (*run.progress.files, "adapter/", f"{checkpoint.FOLDER}/", "tracking/")
            output_folder.clear(folder, keep)
    run.accelerator.wait_for_everyone()
