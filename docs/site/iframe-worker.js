// Runs the worker of the search in a frame when the site is opened as files: browsers start no worker
// from a file. The theme takes it for the package of this name, which it would load from another host.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #waiting = [];
    #frame = document.createElement("iframe");

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const worker = this.#frame.contentWindow;
      worker.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = worker.document.createElement("script");
      script.src = url;
      script.addEventListener("load", () => {
        const messages = this.#waiting;
        this.#waiting = null;
        for (const data of messages) this.postMessage(data);
      });
      worker.document.body.append(script);
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.#frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
