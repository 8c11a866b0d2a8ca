// Browsers start no worker for a page that was opened from a folder, and the search of the theme is one:
// there it runs in a hidden frame instead, which has globals of its own as well.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      document.addEventListener("DOMContentLoaded", () => this.start(url));
      if (document.readyState !== "loading") this.start(url);
    }
    start(url) {
      if (this.frame) return;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inside.document.createElement("script");
      script.src = new URL(url, location.href);
      script.onload = () => {
        this.postMessage = data => inside.dispatchEvent(new MessageEvent("message", { data }));
        this.waiting.forEach(this.postMessage);
      };
      inside.document.head.append(script);
    }
    postMessage(data) {
      this.waiting.push(data);
    }
  };
}
