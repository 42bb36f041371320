"""`vidx completion`."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that lets a shell complete the commands, options and files of vidx.

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
