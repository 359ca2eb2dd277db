// A server of events: /events is a stream of them, /next?N sends one more, /end ends the stream.
// An event is sent only when somebody listens.
import { createServer } from 'node:http'

let listener
let arrived
let waiting = new Promise((resolve) => (arrived = resolve))

createServer(async (request, response) => {
  const [path, query] = request.url.split('?')
  if (path === '/events') {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.flushHeaders()
    listener = response
    arrived()
    return
  }
  await waiting
  if (path === '/next') {
    listener.write(`data: ${query}\n\n`)
    response.end('sent')
  } else {
    listener.end()
    waiting = new Promise((resolve) => (arrived = resolve))
    response.end('ended')
  }
}).listen(3000)
