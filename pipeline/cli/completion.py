"""`vidx completion`."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script by which a shell completes vidx's commands, options and files.

    \b
    eval "$(vidx completion bash)"                                  in ~/.bashrc
    eval "$(vidx completion zsh)"                                   in ~/.zshrc, after compinit
    vidx completion fish > ~/.config/fish/completions/vidx.fish
    """
    from click.shell_completion import get_completion_class

    from pipeline.cli.main import vidx

    completion = get_completion_class(shell)
    assert completion is not None  # click has all the choices
    click.echo(completion(vidx, {}, "vidx", "_VIDX_COMPLETE").source())
