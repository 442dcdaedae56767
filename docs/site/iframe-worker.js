// A browser starts no workers for pages from a folder: the search then runs in a frame without one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = new Promise((done, failed) => {
        const script = inside.document.createElement("script")
        script.src = url
        script.onload = () => done(inside)
        script.onerror = failed
        inside.document.body.append(script)
      })
      this.terminate = () => frame.remove()
    }

    postMessage(data) {
      this.loaded.then(inside => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
