// A page that opens a WebSocket and an EventSource to its own server, and becomes wiser with what it
// gets: its title lists it. Each event and each message is sent only after the page has answered the
// one before, so that nothing of it may be held back. At the end the page uploads a blob as well.
import { createServer } from 'node:http'
import { WebSocketServer } from 'ws'

const page = `<!doctype html><title>begun</title><script>
  const seen = (text) => { document.title = text }
  const events = new EventSource('/events')
  events.onmessage = ({ data }) => {
    seen('event ' + data)
    if (data < 3) return fetch('/next', { method: 'POST' })
    events.close()
    const socket = new WebSocket(location.origin.replace('https', 'wss') + '/socket')
    socket.onopen = () => socket.send('1')
    socket.onmessage = ({ data }) => {
      seen('message ' + data)
      const [number] = data.split(' ')
      if (number < 3) socket.send(String(Number(number) + 1))
      else socket.close(4003, 'seen')
    }
    socket.onclose = async ({ code, reason, wasClean }) => {
      seen('closed ' + code + ' ' + reason + ' ' + wasClean)
      const body = new Blob([new Uint8Array(8 << 20)])
      const answer = await fetch('/upload', { method: 'POST', body })
      const entry = performance.getEntriesByType('navigation')[0]
      seen('uploaded ' + (await answer.text()) + ' by ' + entry.nextHopProtocol)
    }
  }
</script>`

let events
let number = 0
const server = createServer(async (request, response) => {
  if (request.url === '/events') {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    events = response
    events.write(`data: ${(number = 1)}\n\n`)
  } else if (request.url === '/next') {
    events.write(`data: ${(number += 1)}\n\n`)
    response.writeHead(204).end()
  } else if (request.url === '/upload') {
    let size = 0
    for await (const piece of request) size += piece.length
    response.end(String(size))
  } else {
    response.setHeader('content-type', 'text/html')
    response.end(page)
  }
})
new WebSocketServer({ server }).on('connection', (socket, request) => {
  socket.on('message', (data) => socket.send(`${data} ${request.headers.via}`))
})
server.listen(3000)
