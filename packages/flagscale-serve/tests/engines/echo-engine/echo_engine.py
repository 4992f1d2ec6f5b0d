"""An engine of another package: an example of the entry point `flagscale_serve.engines`."""

from flagscale_serve.engines import Layout, Rendered


class Echo:
    """A program that serves one model."""

    name = "echo"
    program = "echo-server"
    modules = ()
    distributions = ()
    install = "pip install echo-engine"
    phases = (("ready", "waiting for the first token"),)
    grace_s = 1.0

    def layout(self, instance):
        """One process on one device."""
        return Layout()

    def render(self, instance, context):
        """Its command line; options would be read from `instance.settled`."""
        argv = (self.program, instance.model, "--port", "{port:" + instance.name + "}")
        return Rendered(argv=argv, env={}, served_names=instance.served_names)
